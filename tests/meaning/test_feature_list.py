"""Lists of features as a person writes them."""

import pytest

from saeflow.meaning.feature_list import parse_features
from saeflow.runtime.errors import UserError


@pytest.mark.parametrize("text", ["", "a", "1,,2", "5-3", "-1", "1-", "10", "9" * 99, "²"])
def test_a_list_of_features_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--features"):
        parse_features(text, 10)


def test_a_list_of_features_may_hold_numbers_and_ranges_or_all() -> None:
    assert parse_features("7, 1-3,2", 10) == [1, 2, 3, 7]
    assert parse_features("all", 4) == [0, 1, 2, 3]
