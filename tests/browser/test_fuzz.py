"""Requests of every kind: no page fails, and input stays text. `python -m tests.fuzz --pages 1000` asks more."""

from __future__ import annotations

import random
import shutil

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from saeflow.store.store import Store
from tests.conftest import Finished
from tests.fuzz.pages import Asking, Pages, problems_of, some_asking
from tests.support.asgi import Answered, ask

HTML = {"content-type": "text/html; charset=utf-8", "content-security-policy": "default-src 'none'"}
JSON = HTML | {"content-type": "application/json"}


@pytest.fixture(scope="module")
def pages(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Pages of a copy of the finished store: labels are written there."""
    root = tmp_path_factory.mktemp("fuzzed") / "store"
    shutil.copytree(finished.store.root, root)
    return Pages(Store.open(root))


@settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
@given(dice=st.randoms(use_true_random=False))
def test_no_request_makes_a_page_fail_or_becomes_part_of_it(pages: Pages, dice: random.Random) -> None:
    asking = some_asking(dice, pages.token)
    note(repr(asking)[:2000])
    assert pages.judged(asking).problems == []


@pytest.mark.parametrize("there", ["features/-1", "nothing/here", "ask/no?a=1", "%00", "features/1?role=%00"])
def test_a_page_that_is_not_there_leads_back_to_its_run(pages: Pages, there: str) -> None:
    judged = pages.judged(Asking(f"/runs/small/{there}"))
    assert (judged.code, judged.problems) == (404, [])


def test_a_run_that_is_not_there_leads_back_to_the_runs(pages: Pages) -> None:
    answer = ask(pages.app, "/runs/other/features/1")
    assert '<a href="/">All runs</a>' in answer.text
    assert 'href="/runs/other"' not in answer.text


@pytest.mark.parametrize(
    "wrong",
    [Answered(500), Answered(200, {}, b"{}"), Answered(200, HTML, b"<a href=/>x</a><zq9>"), Answered(200, HTML, b"x"),
     Answered(200, HTML, b"<a href=/ zq9>x</a>"), Answered(200, HTML, b"<a href=/>\x1b</a>"),
     Answered(200, JSON, b"NaN"), Answered(200, JSON, b"{}", OSError("half of it came"))],
    ids=["fails", "no policy", "tag", "no way back", "attribute", "escape code", "no JSON", "breaks off"],
)  # fmt: skip
def test_a_wrong_answer_is_found(wrong: Answered) -> None:
    right = Answered(200, HTML, b'<a href="/">All runs</a>')
    assert list(problems_of(Asking("/"), right, 1.0)) == []
    assert list(problems_of(Asking("/"), wrong, 1.0))
