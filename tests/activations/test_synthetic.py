"""Made activations of many known features: what is promised of their statistics, and that they can be cut anywhere."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeflow.activations import synthetic
from saeflow.activations.shards import open_site
from saeflow.activations.sparse_values import SparseValues
from saeflow.activations.synthetic import make_table
from saeflow.activations.tables.stream import TableReader
from saeflow.model.sites import Site
from saeflow.pipeline.facts import table_facts
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe, load_recipe, parse_recipe
from saeflow.recipe.synthetic import SyntheticConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.store import Store
from tests.support.small_pipeline import tree

RECIPES = Path(__file__).resolve().parents[2] / "flows" / "recipes"
N_ROWS = 30 * synthetic.BLOCK_ROWS


def settings(**changes) -> SyntheticConfig:
    about = {"kind": "superposed", "n_samples": 10_000, "n_neurons": 16, "n_true": 40, "l0": 3.0, "max_rate": 0.4,
             "magnitude_scale": 0.5, "group_chance": 0.5}  # fmt: skip
    return SyntheticConfig.model_validate(about | changes)


def dense(codes: SparseValues, n: int) -> np.ndarray:
    """Strengths (B, n)."""
    values = np.zeros((len(codes.row_starts) - 1, n), np.float32)
    values[codes.rows, codes.feature_ids] = codes.values
    return values


@pytest.fixture(scope="module")
def strengths() -> np.ndarray:
    """Of the 40 features in 122,880 rows."""
    world = synthetic.SuperposedFeatures.of(settings())
    return np.concatenate([dense(world.block(synthetic.STORED_STREAM, n)[1], 40) for n in range(30)])


@given(
    n=st.integers(1, 300), exponent=st.floats(0, 3), largest=st.floats(0.01, 0.99), share=st.floats(0.001, 1.0)
)  # fmt: skip
def test_rates_fall_by_zipfs_law_below_the_largest_and_sum_to_l0(n, exponent, largest, share):
    rates = synthetic.zipf_rates(n, share * n * largest, exponent, largest)
    assert rates.sum() == pytest.approx(share * n * largest)
    assert 0 < rates.min() <= rates.max() <= largest * (1 + 1e-9)
    assert (np.diff(rates) <= 1e-12).all()
    below = rates < largest * (1 - 1e-9)
    factors = rates[below] * np.arange(1, n + 1)[below] ** exponent
    np.testing.assert_allclose(factors, factors[:1].repeat(len(factors)))


def test_features_fire_at_their_rates(strengths):
    rates = synthetic.SuperposedFeatures.of(settings()).rates
    found = (strengths > 0).mean(0)
    np.testing.assert_array_less(np.abs(found - rates), 5 * np.sqrt(rates * (1 - rates) / N_ROWS))
    assert rates.sum() == pytest.approx(3)
    assert (strengths > 0).sum(1).mean() == pytest.approx(3, abs=0.03)
    assert 0.001 < rates[-1] < rates[0] == 0.4


def test_the_stated_share_of_features_is_in_groups_that_fire_together_and_no_others_do(strengths):
    world = synthetic.SuperposedFeatures.of(settings())
    assert world.groups.shape == (2, 4)
    assert (world.groups % 4 == np.arange(4)).all()
    fires = (strengths > 0).astype(np.float64)
    together = fires.T @ fires / N_ROWS
    group_of = np.full(40, -1)
    group_of[world.groups] = np.arange(2)[:, None]
    for i, j in itertools.combinations(range(40), 2):
        independent = world.rates[i] * world.rates[j]
        linked = group_of[i] == group_of[j] >= 0
        expected = independent / world.group_rates[group_of[i]] if linked else independent
        assert abs(together[i, j] - expected) < 5.5 * np.sqrt(expected / N_ROWS) + 1e-5, (i, j)
        assert not linked or expected > 2 * independent
    rarest = synthetic.SuperposedFeatures.of(settings(n_true=2048, l0=16.0, n_neurons=2))
    assert (1 / rarest.group_rates[-1]) > 300  # times as often as by chance


def test_nobody_in_a_group_fires_without_its_event(strengths):
    world = synthetic.SuperposedFeatures.of(settings())
    for members, rate in zip(world.groups, world.group_rates, strict=True):
        chances = world.rates[members] / rate
        assert chances[0] == pytest.approx(0.5)
        some = (strengths[:, members] > 0).any(1).mean()
        assert some == pytest.approx(rate * (1 - np.prod(1 - chances)), abs=5 * np.sqrt(rate / N_ROWS))


def test_strengths_are_half_normal_above_a_floor(strengths):
    found = strengths[strengths > 0]
    assert found.min() >= 1
    above = found - 1
    assert above.mean() == pytest.approx(0.5 * np.sqrt(2 / np.pi), rel=0.01)
    assert np.square(above).mean() == pytest.approx(0.25, rel=0.02)
    assert (above > 1).mean() == pytest.approx(0.0455, rel=0.05)


def test_a_row_is_its_offset_its_features_and_noise_of_the_stated_size():
    config = settings(noise=0.3, offset=5.0)
    world = synthetic.SuperposedFeatures.of(config)
    np.testing.assert_allclose(np.linalg.norm(world.directions, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(world.offset) == pytest.approx(5)
    rows, codes = world.block(synthetic.STORED_STREAM, 3)
    rest = rows - world.offset - dense(codes, 40) @ world.directions
    assert rest.std() == pytest.approx(0.3, rel=0.02)
    np.testing.assert_allclose(rest.mean(0), 0, atol=5 * 0.3 / np.sqrt(len(rows)))
    covariance = rest.T @ rest / len(rows)
    np.testing.assert_allclose(covariance, 0.09 * np.eye(16), atol=6 * 0.09 / np.sqrt(len(rows)))


def test_rows_without_noise_are_exactly_their_features():
    world = synthetic.SuperposedFeatures.of(settings(noise=0.0, offset=0.0, group_share=0.0))
    rows, codes = world.block(synthetic.STORED_STREAM, 0)
    np.testing.assert_allclose(rows, dense(codes, 40) @ world.directions, atol=1e-5)
    assert world.groups.shape == (0, 4)


def test_every_block_stream_and_seed_is_another_but_always_the_same():
    def block(seed: int, stream: int, number: int) -> np.ndarray:
        return synthetic.SuperposedFeatures.of(settings(seed=seed)).block(stream, number)[0]

    places = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 1, 0), (-1, 1, 0)]
    found = [block(*place) for place in places]
    for place, rows in zip(places, found, strict=True):
        np.testing.assert_array_equal(rows, block(*place))
    for one, other in itertools.combinations(found, 2):
        assert not (one == other).any()


@given(start=st.integers(0, 9_999), n=st.integers(1, 6000))
def test_rows_are_the_same_wherever_reading_begins(start, n):
    stop = min(start + n, 10_000)
    rows = synthetic.superposed_rows(settings(n_neurons=3))
    found = list(TableReader(rows).read(start, stop))
    whole = make_table(settings(n_neurons=3))
    np.testing.assert_array_equal(np.concatenate([values for values, _ in found]), whole.values[start:stop])
    assert [label for _, labels in found for label in labels] == whole.labels[start:stop]


def test_a_row_is_labelled_by_its_strongest_feature():
    world = synthetic.SuperposedFeatures.of(settings(l0=0.5))
    codes = world.block(synthetic.STORED_STREAM, 0)[1]
    expected = [
        synthetic.feature_label(int(row.argmax())) if row.any() else synthetic.NO_FEATURE_LABEL
        for row in dense(codes, 40)
    ]
    rows = synthetic.superposed_rows(settings(l0=0.5))
    labels = next(rows.blocks(0))[1]
    assert labels == expected
    assert synthetic.NO_FEATURE_LABEL in labels
    assert rows.pieces == sorted(rows.pieces)
    assert set(labels) <= set(rows.pieces)


def recipe(n_samples: int = 10_000, part_rows: int = 3000, **changes) -> Recipe:
    made = settings(n_samples=n_samples, **changes).model_dump()
    about = {"synthetic": made, "part_rows": part_rows, "dtype": "float32", "shard_bytes": 65_536}
    return parse_recipe({"name": "made", "activations": about, "threads": 1})


def stored(store: Store, made: Recipe) -> np.ndarray:
    target = Lineage(store, made).activations
    parts = [open_site(target, part, Site("table", 16)).read(slice(None)) for part in target.published().parts]
    return torch.cat(parts)[:, 0].numpy()


@pytest.mark.parametrize("part_rows", [1000, 4096, 20_000])
def test_stored_rows_do_not_depend_on_the_size_of_parts(tmp_path, progress, part_rows):
    store, made = Store.create(tmp_path / "store"), recipe(part_rows=part_rows)
    import_table.run(Lineage(store, made), progress)
    assert made.activations.synthetic is not None
    np.testing.assert_array_equal(stored(store, made), make_table(made.activations.synthetic).values)


def killed_at(start: int) -> Progress:
    """Stops in the middle of the part that begins at this row."""

    def stop(bar: Bar) -> None:
        if bar.done > start:
            raise KeyboardInterrupt

    return Progress(verbosity=-1, listener=stop)


def test_a_killed_making_is_finished_to_the_same_bytes_without_making_again_what_is_there(
    tmp_path, progress, monkeypatch
):
    made = recipe()
    whole, cut = Store.create(tmp_path / "whole"), Store.create(tmp_path / "cut")
    import_table.run(Lineage(whole, made), progress)
    with contextlib.suppress(KeyboardInterrupt):
        import_table.run(Lineage(cut, made), killed_at(7000))
    numbers = []
    real = synthetic.SuperposedFeatures.block
    monkeypatch.setattr(synthetic.SuperposedFeatures, "block", lambda *a: numbers.append(a[2]) or real(*a))
    import_table.run(Lineage(cut, made), progress)
    assert min(numbers) > 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    import_table.run(Lineage(cut, made), progress)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("killed", [False, True])
def test_more_samples_are_appended_and_fewer_take_nothing_away(tmp_path, progress, killed):
    store, few, many = Store.create(tmp_path / "store"), recipe(n_samples=7000), recipe(n_samples=16_000)
    import_table.run(Lineage(store, few), progress)
    assert Lineage(store, few).activations == Lineage(store, many).activations
    kept = [part.folder for part in Lineage(store, few).activations.published().parts[:2]]
    if killed:
        with contextlib.suppress(KeyboardInterrupt):
            import_table.run(Lineage(store, many), killed_at(12_000))
        assert Lineage(store, few).activations.published().total("n_documents") == 7000
    import_table.run(Lineage(store, many), progress)
    parts = Lineage(store, many).activations.published().parts
    assert [part.counts["n_documents"] for part in parts] == [3000] * 5 + [1000]
    assert [part.folder for part in parts[:2]] == kept
    np.testing.assert_array_equal(stored(store, many), make_table(settings(n_samples=16_000)).values)
    before = tree(tmp_path / "store")
    import_table.run(Lineage(store, few), progress)
    assert tree(tmp_path / "store") == before


BIG = """
import sys
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.memory import peak_bytes  # ru_maxrss would begin with that of the parent
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
made = {"kind": "superposed", "n_samples": 300_000, "n_neurons": 512, "n_true": 1000, "l0": 4}
recipe = parse_recipe({"name": "big", "activations": {"synthetic": made, "part_rows": 300_000}, "threads": 1})
store = Store.create(sys.argv[1])
before = peak_bytes()
import_table.run(Lineage(store, recipe), Progress(verbosity=-1))
print((peak_bytes() - before) / (1 << 20))
"""


@pytest.mark.long
def test_600_mb_of_rows_are_made_in_half_of_their_memory(tmp_path):
    command = [sys.executable, "-c", BIG, tmp_path / "store"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 300  # seven runs took 183 to 247


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"l0": 17.0},
            r"synthetic\.l0 is 17, but 40 features \(n_true\) at a rate of .* 0\.4 \(max_rate\) reach only 16.*\nLower",
        ),
        ({"max_rate": 0.5}, r"max_rate is 0\.5, but a feature in a group .*\nSet max_rate below group_chance"),
        ({"max_rate": 1.0}, r"max_rate is 1\.0, but"),
        ({"noise": -1.0}, r"noise is -1\.0"),
    ],
)
def test_rates_that_cannot_be_are_refused_with_the_way_out(changes, says):
    made = settings().model_dump() | changes
    with pytest.raises(UserError, match=says):
        parse_recipe({"name": "made", "activations": {"synthetic": made}})


@pytest.mark.parametrize(("name", "found"), [("five_neurons", "e1d3b6fb"), ("superposition", "5b1dffd7")])
def test_fingerprints_of_older_recipes_are_what_they_were(name, found):
    assert fingerprint(table_facts(load_recipe(RECIPES / f"{name}.toml"))) == found


def test_every_setting_but_the_number_of_rows_makes_other_activations():
    def facts(**changes):
        return table_facts(recipe(**changes))

    assert facts() == facts(n_samples=20_000)
    others = {"l0": 2.0, "zipf_exponent": 2.0, "max_rate": 0.3, "magnitude_floor": 0.0, "magnitude_scale": 2.0,
              "group_share": 0.0, "group_chance": 0.9, "noise": 1.0, "offset": 0.0, "seed": 5}  # fmt: skip
    assert all(facts(**{name: value}) != facts() for name, value in others.items())
