"""Absorption that is planted is found: rows of known features through an autoencoder that absorbs some of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import saeflow as package
from saeflow.query.ask import ask
from saeflow.query.connection import connect
from saeflow.store.store import Store
from tests.support.planted_absorption import GENERAL, Planted


@pytest.mark.parametrize(
    ("rate", "n_absorbing", "missing", "seed"),
    [
        (0.3, 3, 0.05, 0),
        (0.0, 0, 0.1, 1),
        pytest.param(0.05, 1, 0.0, 2, marks=pytest.mark.long),
        pytest.param(0.45, 5, 0.1, 3, marks=pytest.mark.long),
        pytest.param(0.15, 2, 0.3, 4, marks=pytest.mark.long),
    ],
)
def test_planted_absorption_is_found_within_two_percent(
    tmp_path: Path, rate: float, n_absorbing: int, missing: float, seed: int
) -> None:
    planted = Planted.of(rate, n_absorbing, missing, seed)
    planted.write(tmp_path)
    tokens = pa.array(np.flatnonzero(planted.members))
    with connect(Store.open(tmp_path), threads=1, names=["absorption"]) as connection:
        rows = ask(connection, "absorption", {"sql": "as chosen"}, readings=tokens).to_pylist()
    whole = rows[0]
    assert whole["generals"] == [GENERAL]
    assert whole["n_class"] == planted.members.sum()
    assert whole["absorption_rate"] == pytest.approx(sum(planted.absorbed.values()), abs=0.02)
    assert whole["absorption_rate"] == pytest.approx(rate, abs=0.04)  # of the draw itself
    found = {row["feature_id"]: row["share"] for row in rows if row["feature_id"] is not None}
    assert set(found) == set(planted.absorbs)
    for feature, share in planted.absorbed.items():
        assert found[feature] == pytest.approx(share, abs=0.02)
    assert whole["n_silent"] / whole["n_class"] == pytest.approx(rate + missing, abs=0.05)


def test_each_condition_of_absorption_can_be_made_too_strict(tmp_path: Path) -> None:
    planted = Planted.of(0.3, 3, 0.05, 0)
    planted.write(tmp_path)
    tokens = pa.array(np.flatnonzero(planted.members))
    with connect(Store.open(tmp_path), threads=1, names=["absorption"]) as connection:
        for strict in ({"min_cosine": 0.8}, {"min_pull": 9.0}, {"min_precision": 1.1}):
            rows = ask(connection, "absorption", {"sql": "as chosen"} | strict, readings=tokens).to_pylist()
            assert [(row["all_absorbed"], row["feature_id"]) for row in rows] == [(0, None)]


def test_absorption_of_a_class_by_select_is_that_of_its_tokens(tmp_path: Path) -> None:
    planted = Planted.of(0.3, 3, 0.05, 0)
    planted.write(tmp_path)
    tokens = np.flatnonzero(planted.members)[:900].tolist()
    with package.open(tmp_path, threads=1) as run:
        by_number = run.ask("absorption", tokens=tokens, min_precision=0.5)
        values = ", ".join(f"({token})" for token in tokens)
        assert run.ask("absorption", f"select * from (values {values}) as t(token_id)", min_precision=0.5).equals(
            by_number
        )
        assert by_number.num_rows == 3
