"""The benchmark that judges low precision compares what belongs together."""

import dataclasses

import pytest

from saeflow.cli.synth import Synth
from saeflow.sae.recovery import RecoveryScores
from tests.benchmarks import low_precision

ZERO = RecoveryScores(*(0 for _ in dataclasses.fields(RecoveryScores)))


def test_every_architecture_is_trained_every_way_from_every_seed():
    members = low_precision.recipe_of(1000, [3, 4], quick=True).members()
    ways = {(m.sae.architecture, m.train.moments, m.train.weights, m.sae.seed) for m in members}
    assert len(ways) == len(members) == 2 * 4 * 2
    assert {m.train.token_topk_share for m in members if m.sae.architecture == "topk"} == {0}


def test_a_way_is_compared_with_float32_seed_by_seed():
    lost = {("float32", "float32"): 0.0, ("8bit", "float32"): 0.004, ("float32", "bfloat16"): -0.02}
    judged = []
    for member in low_precision.recipe_of(1000, [3, 4], quick=True).members():
        f1 = 0.1 * member.sae.seed - lost.get((member.train.moments, member.train.weights), 0.03 * member.sae.seed)
        judged.append(Synth(member, "", dataclasses.replace(ZERO, f1=f1)))
    for ways in low_precision.by_way(judged).values():
        bars = {bar.name.partition(", ")[2]: bar for bar in low_precision.bars_of("", ways)}
        measured = {way: bars[f"{way}: F1 less than float32's"] for way in list(low_precision.WAYS)[1:]}
        assert [bar.measured for bar in measured.values()] == pytest.approx([0.004, -0.02, 0.03 * 3.5])
        assert [bar.holds for bar in measured.values()] == [True, True, False]
        assert measured["both"].spread == pytest.approx(0.015)
        assert measured["8-bit moments"].spread == pytest.approx(0)
