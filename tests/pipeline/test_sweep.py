"""Many SAEs in one reading: the same bytes as separate runs, killed or not, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeflow.activations.feed import Feed
from saeflow.pipeline import collect, stages, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.judge import evaluate, sweep
from saeflow.pipeline.lineage import Lineage, last_log_row
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import Architecture, SAEConfig
from saeflow.recipe.sweep import IGNORED_SETTINGS
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from saeflow.runtime.progress import Bar, Progress
from saeflow.runtime.text import human_bytes
from saeflow.sae.formats.load import load_sae
from saeflow.store.lease_slot import FileSlot
from saeflow.store.records import Hidden, read_checked
from saeflow.store.store import Store
from saeflow.train.group import TrainingGroup, fit
from saeflow.train.training import FeedBatch, Training, sample_rows
from tests.support.small_pipeline import a_table, brought_data, quiet, recipe_data, take_over, tree, write_table

SWEEP: dict[str, Any] = {
    "grid": {"sae.k": [3, 6]},
    "each": [
        {"sae.architecture": "topk"},
        {"sae.architecture": "batchtopk", "train.lr": 0.003},
        {"sae.architecture": "jumprelu", "sae.penalty_weight": 0.02, "train.n_tokens": 2000},
    ],
}
NAMES = [
    "brought_topk_k3", "brought_topk_k6",
    "brought_batchtopk_k3_lr0p003", "brought_batchtopk_k6_lr0p003",
    "brought_jumprelu_k3_penalty_weight0p02_n_tokens2000", "brought_jumprelu_k6_penalty_weight0p02_n_tokens2000",
]  # fmt: skip


class Killed(BaseException):
    """The process is gone: nothing more is saved."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t.npy", a_table())


@pytest.fixture(scope="module")
def stored(table, tmp_path_factory) -> Store:
    """A store that holds only the table, in float32."""
    store = Store.create(tmp_path_factory.mktemp("stored") / "store")
    import_table.run(Lineage(store, recipe_of(table)), quiet())
    return store


@pytest.fixture
def store(stored, tmp_path) -> Store:
    """A copy to train in."""
    shutil.copytree(stored.root, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def separate(stored, table, tmp_path_factory) -> Store:
    """A store in which each member of the sweep was trained by a run of its own."""
    root = tmp_path_factory.mktemp("separate") / "store"
    shutil.copytree(stored.root, root)
    for member in recipe_of(table, sweep=SWEEP).members():
        train.run(Lineage(Store(root), member), quiet())
    return Store(root)


def recipe_of(table: Path, **changes) -> Recipe:
    given_first = {
        "activations": {"dtype": "float32"},
        "train": {"n_tokens": 5000, "log_every": 3},
        "feed": {"batch_rows": 128, "block_bytes": 2400, "pool_bytes": 24_000},
    }
    merged = {key: {**given_first.get(key, {}), **changes.get(key, {})} for key in given_first | changes}
    return parse_recipe(brought_data(table, **merged))


def said(progress: Progress) -> list[str]:
    lines: list[str] = []
    progress.say = lambda text, verbosity=0: lines.append(text)  # type: ignore[method-assign]
    return lines


def test_members_have_readable_names_and_all_other_settings_of_their_recipe(table):
    recipe = recipe_of(table, sweep=SWEEP)
    members = recipe.members()
    assert [member.name for member in members] == NAMES
    assert {member.data for member in members} == {"brought"}
    assert not any(member.is_sweep for member in members)
    assert [member.sae.k for member in members] == [3, 6, 3, 6, 3, 6]
    assert [member.train.n_tokens for member in members] == [5000, 5000, 5000, 5000, 2000, 2000]
    for member in members:
        others = {"name", "data", "sae", "train", "sweep"}
        assert member.model_dump(exclude=others) == recipe.model_dump(exclude=others)
    assert recipe_of(table).members() == [recipe_of(table)]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sae.l1_weight": 0.02}, "brought_l1_weight0p02"),
        ({"train.lr": 1e-5}, "brought_lr1em05"),
        ({"sae.unit_norm": False}, "brought_no_unit_norm"),
        ({"train.decay": "cosine"}, "brought_cosine"),
        ({"sae.site": "transformer.h.3.mlp:input"}, "brought_transformer_h_3_mlp_input"),
        ({"sae.prefixes": [4, 16]}, "brought_prefixes4_16"),
        ({"train.resample_at": [0.25, 0.5]}, "brought_resample_at0p25_0p5"),
        ({"sae.seed": -1, "sae.architecture": "topk"}, "brought_topk_seedm1"),
        ({"sae": {"k": 5, "architecture": "relu"}}, "brought_relu_k5"),
    ],
)  # fmt: skip
def test_a_member_is_named_by_its_settings(table, settings, name):
    recipe = recipe_of(table, sweep={"each": [settings, {"sae.n_features": 32}]})
    assert [member.name for member in recipe.members()] == [name, "brought_n_features32"]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({"grid": {"sae.n_feature": [1]}}, ["sae.n_feature,", "Nearest: sae.n_features", "[sae] and [train]"]),
        ({"grid": {"feed.seed": [1]}}, ["feed.seed", "Nearest: sae.seed", "all its SAEs share the rest"]),
        ({"each": [{"tokens.packing": "isolated"}]}, ["tokens.packing"]),
        ({"grid": {"sae.k": []}}, ["sweep.grid has no values for sae.k"]),
        ({"grid": {"sae.k": [2]}, "each": [{"sae.k": 3}]}, ["sae.k is in both sweep.grid and sweep.each"]),
        ({"grid": {"sae.k": [2, 2]}}, ["two SAEs", "brought_k2"]),
        ({"grid": {"sae.k": [2, 65]}}, ["brought_k65: sae.k is 65", "at most 64"]),
        ({"grid": {"train.lr": [-1.0]}}, ["train.lr is -1.0", "greater than 0"]),
        (
            {"grid": {"sae.k": [2, 3], "sae.architecture": ["topk", "relu"]}},
            ["brought_relu_k2 and brought_relu_k3", "the same SAE: relu does not read sae.k."],
        ),
        (
            {"grid": {"sae.l1_weight": [0.1, 0.2], "train.k_start": [5]}},
            ["batchtopk does not read sae.l1_weight."],
        ),
        ({"gird": {}}, ["sweep.gird", "Did you mean grid?"]),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_when_the_recipe_is_read(table, sweep, says):
    with pytest.raises(UserError) as caught:
        recipe_of(table, sweep=sweep)
    assert not [words for words in says if words not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("sweep", [{}, {"each": [{}]}, {"each": [], "grid": {}}])
def test_a_sweep_that_changes_nothing_is_no_sweep(table, sweep):
    recipe = recipe_of(table, sweep=sweep)
    assert not recipe.is_sweep
    assert recipe.members() == [recipe]


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_settings_said_to_be_ignored_change_no_weight(stored, table, architecture):
    other = {
        "sae": {
            "k": 9, "prefixes": [16, 32], "l1_weight": 0.5, "l1_norm_weighted": True, "penalty": "tanh",
            "penalty_weight": 9.0, "tanh_scale": 1.0, "bandwidth": 0.1, "first_threshold": 0.5, "first_share": 0.02,
        },
        "train": {"k_start": 12, "k_anneal_share": 0.9, "aux_weight": 0.5, "sparsity_warmup_share": 0.5},
    }  # fmt: skip
    ignored = IGNORED_SETTINGS[architecture]
    mine = {
        name: {key: value for key, value in values.items() if f"{name}.{key}" in ignored}
        for name, values in other.items()
    }
    about = {"architecture": architecture, "unit_norm": False}
    few = {"n_tokens": 1000, "dead_after_tokens": 200}
    recipes = [
        recipe_of(table, sae=about, train=few),
        recipe_of(table, sae=about | mine["sae"], train=few | mine["train"]),
    ]
    weights = []
    for recipe in recipes:
        feed = train.open_feed(Lineage(stored, recipe))
        training = Training.begin(feed, recipe)
        for number, values in zip(range(4), feed.aligned(), strict=False):
            training.advance(FeedBatch(number, values, feed))
        weights.append(training.sae.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_each_sae_of_a_sweep_is_byte_for_byte_that_of_a_run_of_its_own(store, table, separate):
    recipe = recipe_of(table, sweep=SWEEP)
    trained = train.run_all(Lineage(store, recipe), quiet())
    assert [target.name for target in trained] == NAMES
    assert tree(store.root) == tree(separate.root)
    before = tree(store.root)
    progress = quiet()
    lines = said(progress)
    train.run(Lineage(store, recipe), progress)
    assert tree(store.root) == before
    assert lines == ["train: already done, 6 SAEs of brought; nothing to do"]


def test_a_sweep_reads_the_store_as_often_as_its_longest_training(store, table, monkeypatch):
    feeds: list[Feed] = []
    run = TrainingGroup.run

    def noting(self):
        feeds.append(self.feed)
        run(self)

    monkeypatch.setattr(TrainingGroup, "run", noting)
    recipe = recipe_of(table, sweep=SWEEP)
    train.run(Lineage(store, recipe.members()[0]), quiet())
    train.run(Lineage(store, recipe), quiet())
    one, many = feeds
    assert many.n_bytes_read <= 1.05 * one.n_bytes_read


@pytest.mark.long
@pytest.mark.parametrize("n_saved", [1, 7, 8, 40, 100])
def test_a_sweep_killed_between_two_checkpoints_goes_on_to_the_same_bytes(store, table, separate, monkeypatch, n_saved):
    recipe = recipe_of(table, sweep=SWEEP, train={"checkpoint_seconds": 1e-9})
    save, saved = Training.save, []

    def dying(self, *places):
        if len(saved) == n_saved:
            raise Killed
        save(self, *places)
        saved.append(self.step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", dying)
        with pytest.raises(Killed):
            train.run(Lineage(store, recipe), quiet())
    progress = quiet()
    lines = said(progress)
    train.run(Lineage(store, recipe), progress)
    assert [line for line in lines if re.search(r"brought_\w+ continuing at step \d+ of \d+", line)]
    assert tree(store.root) == tree(separate.root)


@pytest.mark.long
@pytest.mark.parametrize("n_steps", [1, 8, 50, 120])
def test_a_sweep_interrupted_in_the_middle_of_a_batch_loses_no_step(store, table, separate, monkeypatch, n_steps):
    recipe = recipe_of(table, sweep=SWEEP)
    advance, taken = Training.advance, []

    def interrupted(self, batch):
        if len(taken) == n_steps:
            raise KeyboardInterrupt
        taken.append(self.name)
        return advance(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(Lineage(store, recipe), quiet())

    def counting(self, batch):
        taken.append(self.name)
        return advance(self, batch)

    monkeypatch.setattr(Training, "advance", counting)
    train.run(Lineage(store, recipe), quiet())
    assert tree(store.root) == tree(separate.root)
    steps = [taken.count(member.name) for member in recipe.members()]
    assert steps == [training_steps(store, member) for member in recipe.members()], "no step was made twice"


def training_steps(store: Store, recipe: Recipe) -> int:
    return int(last_log_row(Lineage(store, recipe).sae)["step"]) + 1


def test_a_member_that_diverges_leaves_the_others_their_work(store, table, separate):
    bad = {"sae.architecture": "jumprelu", "sae.unit_norm": False, "train.lr": 1e30}
    recipe = recipe_of(table, sweep={"each": [*SWEEP["each"], bad], "grid": SWEEP["grid"]})
    with pytest.raises(UserError, match=r"brought_jumprelu_k3_no_unit_norm_lr1e30: The loss is .* Lower train\.lr"):
        train.run(Lineage(store, recipe), quiet())
    progress = quiet()
    lines = said(progress)
    train.run(Lineage(store, recipe_of(table, sweep=SWEEP)), progress)
    assert sum("continuing at step" in line for line in lines) == 6
    shutil.rmtree(store.root / "tmp")
    assert tree(store.root) == {name: text for name, text in tree(separate.root).items() if not name.startswith("tmp")}


def test_restarts_read_the_store_once_and_the_best_is_kept(store, stored, table, tmp_path):
    recipe = recipe_of(table, train={"restarts": 3})
    feed = train.open_feed(Lineage(store, recipe))
    found = fit(feed, recipe, tmp_path / "checkpoints", quiet())
    alone = []
    for seed in range(3):
        seeded = recipe.model_copy(
            update={
                "sae": recipe.sae.model_copy(update={"seed": seed}),
                "train": recipe.train.model_copy(update={"restarts": 1}),
            }
        )
        one = train.open_feed(Lineage(store, seeded))
        alone.append(fit(one, seeded, tmp_path / f"alone-{seed}", quiet()))
        assert feed.n_bytes_read <= 1.2 * one.n_bytes_read, "the sample is read again, to choose"
    rows = sample_rows(feed)
    errors = [each.error(rows) for each in alone]
    assert found.error(rows) == min(errors) < max(errors)


def test_a_sweep_that_memory_cannot_hold_is_refused_with_both_numbers(store, table):
    recipe = recipe_of(table, sweep={"grid": {"sae.n_features": [64, 10**12]}})
    with pytest.raises(UserError) as caught:
        train.run(Lineage(store, recipe), quiet())
    needed, there = (3 * (64 + 10**12) + 10**12) * 26 * 4, total_memory()  # the gradients are those of the larger one
    assert f"2 SAEs in training take {human_bytes(needed)} (weights, gradients, moments)" in str(caught.value)
    assert f"has {human_bytes(there)} of memory.\nTrain fewer at once: shorten [sweep]" in str(caught.value)
    train.run(Lineage(store, recipe.members()[0]), quiet())


def test_members_may_read_different_sites_each_is_read_once(tmp_path, ingredients):
    sites = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    sweep = {"grid": {"sae.site": sites, "sae.k": [2, 4]}}
    feed = {"batch_rows": 100, "block_bytes": 4096, "pool_bytes": 20_000}
    data = recipe_data(ingredients, activations={"sites": sites}, sweep=sweep, train={"n_tokens": 3000}, feed=feed)
    recipe, store = parse_recipe(data), Store.create(tmp_path / "store")
    tokens.run(Lineage(store, recipe), quiet())
    collect.run(Lineage(store, recipe), quiet())
    shutil.copytree(store.root, tmp_path / "separate")
    train.run(Lineage(store, recipe), quiet())
    for member in recipe.members():
        train.run(Lineage(Store(tmp_path / "separate"), member), quiet())
    assert tree(store.root) == tree(tmp_path / "separate")


@pytest.fixture(scope="module")
def judged(tmp_path_factory, ingredients) -> tuple[Store, Recipe, dict[str, Any]]:
    """A sweep over a model's activations, run to its table."""
    store = Store.create(tmp_path_factory.mktemp("judged") / "store")
    sweep = {"grid": {"sae.k": [2, 4, 8], "sae.architecture": ["topk", "batchtopk"]}}
    recipe = parse_recipe(recipe_data(ingredients, sweep=sweep, train={"n_tokens": 6000}))
    return store, recipe, stages.run(Lineage(store, recipe), quiet())


def test_the_table_has_the_figures_of_judging_each_sae_alone(judged):
    store, recipe, summary = judged
    rows = summary["sweep"]["saes"]
    assert [row["member"] for row in rows] == [member.name for member in recipe.members()]
    for row, member in zip(rows, recipe.members(), strict=True):
        target = Lineage(store, member).sae
        alone = evaluate.judge_together(Lineage(store, member), [load_sae(target.path)], quiet())[0].figures
        assert {name: row[name] for name in sweep.JUDGED_FIGURES} == {
            name: alone[name] for name in sweep.JUDGED_FIGURES
        }
        assert (row["sae"], row["architecture"]) == (target.id, member.sae.architecture)
        assert (row["sparsity"], row["n_features"]) == (f"k {member.sae.k}", 64)
    assert summary["sweep"] == read_checked(table_of(store))


def test_a_sweep_is_judged_again_once_a_document_is_hidden(store, table):
    recipe = recipe_of(table, sweep={"grid": {"sae.k": [3, 6]}}, train={"n_tokens": 500})
    train.run(Lineage(store, recipe), quiet())
    first = sweep.run(Lineage(store, recipe), quiet())
    assert sweep.run(Lineage(store, recipe), quiet()) == first
    source = Lineage(store, recipe).tokens
    one = Hidden(document_id=0, key_hash="00", reason="forgotten")
    source.publish(source.published().parts, hidden={source.published().parts[0].index: (one,)})
    assert sweep.run(Lineage(store, recipe), quiet())["tokens"] != first["tokens"]


def test_who_has_lost_the_lease_writes_no_table(store, table):
    recipe = recipe_of(table, sweep={"grid": {"sae.k": [3, 6]}}, train={"n_tokens": 500})
    train.run(Lineage(store, recipe), quiet())

    def too_slow(_: Bar) -> None:
        [lease] = (store.root / "tmp" / "locks").glob("sweeps-*.lease")
        take_over(FileSlot(lease))

    with pytest.raises(UserError, match="has taken over"):
        sweep.run(Lineage(store, recipe), Progress(verbosity=-1, listener=too_slow))
    assert not list(store.root.glob("sweeps/*/*"))


def table_of(store: Store) -> Path:
    [path] = store.root.glob("sweeps/*/table.json")
    return path


def test_the_picture_lies_beside_the_table_and_shows_every_sae(judged):
    store, recipe, summary = judged
    picture = sweep.picture_of(Lineage(store, recipe))
    assert picture.parent == table_of(store).parent
    assert picture.read_bytes()[:4] == b"\x89PNG"
    figure = sweep.draw(recipe.name, summary["sweep"]["saes"])
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    assert sum(len(drawn.get_offsets()) for drawn in axes.collections) == 6
    assert sorted(text.get_text() for text in axes.texts) == sorted(2 * ["k2", "k4", "k8"])
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"Pareto front", "topk", "batchtopk"}


def test_a_judged_sweep_is_not_judged_again_and_nothing_is_encoded(judged):
    store, recipe, summary = judged
    before = tree(store.root)
    again = stages.run(Lineage(store, recipe), quiet())
    assert (tree(store.root), again["sweep"]) == (before, summary["sweep"])
    assert not (store.root / "features").exists()


def test_a_member_goes_on_to_its_features_without_training(judged, tmp_path):
    shutil.copytree(judged[0].root, tmp_path / "store")
    store, member = Store(tmp_path / "store"), judged[1].members()[3]
    trained = tree(store.root / "saes")
    summary = stages.run(Lineage(store, member), quiet())
    assert tree(store.root / "saes") == trained
    assert len(list((store.root / "activations").iterdir())) == 1
    [run] = store.artefacts("features")
    assert run.name == summary["run"] == member.name


def test_a_sweep_that_is_not_trained_is_not_judged(store, table):
    recipe = recipe_of(table, sweep=SWEEP)
    train.run(Lineage(store, recipe.members()[0]), quiet())
    with pytest.raises(UserError, match=r"Not trained yet: brought_topk_k6, .*saeflow train RECIPE"):
        sweep.run(Lineage(store, recipe), quiet())


@given(points=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_the_front_holds_what_nothing_betters(points):
    front = sweep.pareto(points)
    assert front
    for number, (x, y) in enumerate(points):
        better = [(a, b) for a, b in points if (a < x and b <= y) or (a <= x and b < y)]
        assert (number in front) == (not better)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"architecture": "topk", "k": 7}, "k 7"),
        ({"architecture": "relu", "l1_weight": 0.02}, "penalty 0.02"),
        ({"architecture": "jumprelu", "k": 7}, "k 7"),
        ({"architecture": "jumprelu", "penalty": "tanh", "penalty_weight": 0.5}, "penalty 0.5"),
    ],
)
def test_the_table_says_what_makes_an_sae_sparse(settings, says):
    assert sweep.sparsity(SAEConfig(**settings)) == says


def test_the_disk_contract_explains_every_key_of_the_table(judged):
    page = (Path(__file__).resolve().parents[2] / "data" / "README.md").read_text("utf-8")
    section = page.split("## Sweeps\n")[1].split("\n## ")[0]
    keys = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    [row, *_] = judged[2]["sweep"]["saes"]
    assert keys == row.keys()
