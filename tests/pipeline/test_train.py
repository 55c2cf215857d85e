"""Training: the schedule, exact resume, what is published, what is refused."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from saeflow.activations.upload import uploaded
from saeflow.model.load import load_model
from saeflow.pipeline import collect, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage, last_log_row, n_tokens_seen
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import Architecture, TrainConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Bar, Progress
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.tensors import read_tensors
from saeflow.store.files import read_json, write_json
from saeflow.store.records import Damaged
from saeflow.store.store import Store
from saeflow.train import checkpoint, group, schedules
from saeflow.train.checkpoint import is_checkpoint
from saeflow.train.fused import require_kernels
from saeflow.train.group import checkpoints_of, fit
from saeflow.train.training import FeedBatch, Training, sample_rows
from tests.support.fake_lane import FakeLane
from tests.support.small_pipeline import a_table, brought_data, quiet, recipe_data, tree, write_table

ARCHITECTURES = get_args(Architecture)
BATCHES = 3
"""In one epoch of the table's 700 rows."""


class Killed(BaseException):
    """The process is gone: nothing more is saved."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "t.npy", a_table())


@pytest.fixture(scope="module")
def stored(table, tmp_path_factory) -> Iterator[Store]:
    """A store that holds only the table, in float32. Tests share it, so nobody may train in it."""
    store = Store.create(tmp_path_factory.mktemp("stored") / "store")
    import_table.run(Lineage(store, recipe_of(table)), quiet())
    yield store
    assert not store.artefacts("saes"), "a test trained in the store that all share: it wants the fixture `store`"


@pytest.fixture
def store(stored, tmp_path) -> Store:
    """A copy to train in."""
    shutil.copytree(stored.root, tmp_path / "store")
    return Store(tmp_path / "store")


def recipe_of(table: Path, **changes) -> Recipe:
    given_first = {"activations": {"dtype": "float32"}, "train": {"n_tokens": 20 * 700 // BATCHES, "log_every": 3}}
    merged = {key: {**given_first.get(key, {}), **changes.get(key, {})} for key in given_first | changes}
    return parse_recipe(brought_data(table, **merged))


def stopping_after(n_rows: int, error: type[BaseException]) -> Progress:
    """Progress that ends the training once it has seen more than `n_rows` rows."""

    def listen(bar: Bar) -> None:
        if bar.stage == "train" and bar.done > n_rows:
            raise error

    return Progress(verbosity=-1, listener=listen)


def log_of(store: Store, recipe: Recipe) -> dict[str, list[float]]:
    return pq.read_table(Lineage(store, recipe).sae.path / "log.parquet").to_pydict()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_explains_the_activations_and_says_so_step_by_step(store, table, architecture):
    sae = {"architecture": architecture, "k": 6, "l1_weight": 0.05}
    n_tokens = 100_000 if architecture == "jumprelu" else 40_000  # thresholds are longer on their way to k
    recipe = recipe_of(table, sae=sae, train={"n_tokens": n_tokens, "lr": 5e-3, "log_every": 50})
    train.run(Lineage(store, recipe), quiet())
    log = log_of(store, recipe)
    assert log["variance_unexplained"][-1] < 0.25 * log["variance_unexplained"][0]
    assert architecture in ("relu", "gated") or log["l0"][-1] == pytest.approx(6, abs=0.5)


def test_the_log_is_keyed_by_step_and_holds_the_schedule(store, table):
    recipe = recipe_of(table, train={"lr": 1e-3})
    train.run(Lineage(store, recipe), quiet())
    log = log_of(store, recipe)
    assert log["step"] == [0, 3, 6, 9, 12, 15, 18, 19]
    assert log["lr"] == [schedules.learning_rate(int(step), 20, recipe.train) for step in log["step"]]
    assert set(log["batch_rows"]) <= {233, 234}
    assert log["step"][-1] == last_log_row(Lineage(store, recipe).sae)["step"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def undisturbed(request, stored, table, tmp_path_factory) -> tuple[Recipe, dict[str, bytes]]:
    """A recipe of each architecture that saves after every step, and the store of its training."""
    recipe = recipe_of(table, sae={"architecture": request.param}, train={"checkpoint_seconds": 1e-9})
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    shutil.copytree(stored.root, folder)
    train.run(Lineage(Store(folder), recipe), quiet())
    return recipe, tree(folder)


@pytest.mark.long
@pytest.mark.parametrize("n_rows", [240, 2000, 4400])
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_bytes(store, undisturbed, n_rows):
    recipe, wanted = undisturbed
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(n_rows, Killed))
    assert not Lineage(store, recipe).sae.exists()
    said = []
    loud = Progress(verbosity=-1)
    loud.say = lambda text, verbosity=0: said.append(text)
    train.run(Lineage(store, recipe), loud)
    assert any("continuing at step" in line for line in said)
    assert tree(store.root) == wanted


def test_an_interrupted_training_keeps_what_it_has_done(store, stored, table, tmp_path):
    recipe = recipe_of(table)
    shutil.copytree(stored.root, tmp_path / "undisturbed")
    train.run(Lineage(Store(tmp_path / "undisturbed"), recipe), quiet())
    with pytest.raises(KeyboardInterrupt):
        train.run(Lineage(store, recipe), stopping_after(2000, KeyboardInterrupt))
    states = [read_json(path) for path in (store.root / "tmp").rglob("state.json")]
    assert [state["step"] for state in states] == [9]
    train.run(Lineage(store, recipe), quiet())
    assert tree(store.root) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("moment", ["zero_grad", "step"])
def test_an_interrupt_in_the_middle_of_a_step_does_not_spoil_the_result(
    store, stored, table, tmp_path, monkeypatch, moment
):
    recipe = recipe_of(table)
    shutil.copytree(stored.root, tmp_path / "undisturbed")
    train.run(Lineage(Store(tmp_path / "undisturbed"), recipe), quiet())
    calls, real = [], getattr(torch.optim.Adam, moment)

    def interrupted(self, *arguments, **options):
        real(self, *arguments, **options)
        calls.append(None)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(Lineage(store, recipe), quiet())
    train.run(Lineage(store, recipe), quiet())
    assert tree(store.root) == tree(tmp_path / "undisturbed")


def test_a_checkpoint_cut_down_while_it_was_replaced_gives_way_to_the_new_one(stored, table, tmp_path):
    recipe = recipe_of(table)
    feed = train.open_feed(Lineage(stored, recipe))
    training = Training.begin(feed, recipe)
    training.save(tmp_path / "checkpoint")
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "checkpoint.new")
    (tmp_path / "checkpoint" / "state.safetensors").unlink()
    assert training.restore(tmp_path / "checkpoint")
    assert is_checkpoint(tmp_path / "checkpoint"), "`save` begins with taking the new one away"
    assert not (tmp_path / "checkpoint.new").exists()


def test_the_weights_of_a_checkpoint_are_on_the_disk_before_the_file_that_calls_it_whole(
    stored, table, tmp_path, monkeypatch
):
    recipe = recipe_of(table)
    begun = Training.begin(train.open_feed(Lineage(stored, recipe)), recipe)
    done: list[str] = []
    write = checkpoint.write_checked
    monkeypatch.setattr(checkpoint, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(checkpoint, "write_checked", lambda path, value: (done.append(path.name), write(path, value)))
    begun.save(tmp_path / "checkpoint")
    assert done == ["state.safetensors", "state.json"]


def test_ranks_that_end_without_a_word_and_without_the_sae_are_an_error(store, table):
    lineage = Lineage(store, recipe_of(table, train={"n_tokens": 100}))
    with pytest.raises(UserError, match=r"that trained saes/\S+ together have ended before it was done"):
        train.require_published([lineage.sae])
    train.run(lineage, quiet())
    train.require_published([lineage.sae])


def test_a_checkpoint_of_weights_and_a_count_of_other_steps_is_refused(stored, table, tmp_path):
    recipe = recipe_of(table)
    begun = Training.begin(train.open_feed(Lineage(stored, recipe)), recipe)
    for step in (60, 200):
        begun.step = step
        begun.save(tmp_path / str(step))
    (tmp_path / "60" / "state.json").replace(tmp_path / "200" / "state.json")
    with pytest.raises(UserError, match=r"state\.safetensors is of step 200, state\.json of step 60"):
        begun.restore(tmp_path / "200")


def test_a_training_whose_lease_is_lost_leaves_the_checkpoint_of_the_next_owner_as_it_is(stored, table, tmp_path):
    recipe = recipe_of(table)
    begun = Training.begin(train.open_feed(Lineage(stored, recipe)), recipe)
    begun.step = 200
    begun.save(tmp_path / "checkpoint")
    before, begun.step = tree(tmp_path / "checkpoint"), 60

    def lost():
        raise UserError("silent")

    with pytest.raises(UserError, match="silent"):
        begun.save(tmp_path / "checkpoint", tmp_path / "own", lost)
    assert tree(tmp_path / "checkpoint") == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "own"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "harm", [cut, partial(flip, share=0.0), partial(flip, share=0.4), partial(flip, share=0.9)],
    ids=["cut", "first byte", "at 40%", "at 90%"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_never_gone_on_with(stored, table, tmp_path, name, harm):
    recipe = recipe_of(table)
    begun = Training.begin(train.open_feed(Lineage(stored, recipe)), recipe)
    begun.save(tmp_path / "checkpoint")
    harm(tmp_path / "checkpoint" / name)
    with pytest.raises(Damaged, match=rf"checkpoint {tmp_path}/checkpoint is damaged"):
        begun.restore(tmp_path / "checkpoint")
    begun.step = 7
    begun.save(tmp_path / "checkpoint.new")
    begun.step = 0
    assert begun.restore(tmp_path / "checkpoint"), "the other one is whole"
    assert begun.step == 7


def test_a_training_whose_checkpoint_was_damaged_begins_anew_says_so_and_ends_equal(store, stored, table, tmp_path):
    recipe = recipe_of(table)
    shutil.copytree(stored.root, tmp_path / "undisturbed")
    train.run(Lineage(Store(tmp_path / "undisturbed"), recipe), quiet())
    with pytest.raises(KeyboardInterrupt):
        train.run(Lineage(store, recipe), stopping_after(2000, KeyboardInterrupt))
    [state] = (store.root / "tmp").rglob("state.safetensors")
    flip(state, 0.5)
    said: list[str] = []
    loud = quiet()
    loud.say = lambda text, verbosity=0: said.append(text)
    train.run(Lineage(store, recipe), loud)
    assert any("the checksum of state.safetensors is wrong" in line and "begins anew" in line for line in said)
    assert tree(store.root) == tree(tmp_path / "undisturbed")


def test_a_checkpoint_of_an_earlier_saeflow_has_no_checksum_and_is_gone_on_with(stored, table, tmp_path):
    recipe = recipe_of(table)
    begun = Training.begin(train.open_feed(Lineage(stored, recipe)), recipe)
    begun.step = 5
    begun.save(tmp_path / "checkpoint")
    about = read_json(tmp_path / "checkpoint" / "state.json")
    write_json(tmp_path / "checkpoint" / "state.json", {k: about[k] for k in ("step", "scales", "product", "log")})
    begun.step = 0
    assert begun.restore(tmp_path / "checkpoint")
    assert begun.step == 5


def test_a_second_run_trains_nothing(store, table):
    recipe = recipe_of(table)
    before = tree(train.run(Lineage(store, recipe), quiet()).path)
    assert tree(train.run(Lineage(store, recipe), stopping_after(-1, Killed)).path) == before


def test_the_published_autoencoder_is_made_for_activations_as_they_are(tmp_path):
    """64 times larger activations: the same directions, and biases, threshold and values 64 times larger."""
    found = []
    for factor in (1, 64):
        store = Store.create(tmp_path / str(factor))
        recipe = recipe_of(write_table(tmp_path / f"{factor}.npy", factor * a_table()))
        import_table.run(Lineage(store, recipe), quiet())
        found.append(train.run(Lineage(store, recipe), quiet()).path)
    small, large = (load_file(path / "sae_weights.safetensors") for path in found)
    for name, factor in {"W_enc": 1, "W_dec": 1, "b_enc": 64, "b_dec": 64, "threshold": 64}.items():
        torch.testing.assert_close(large[name], factor * small[name], rtol=0, atol=0)
    x = torch.from_numpy(a_table())
    one, other = (load_sae(path) for path in found)
    torch.testing.assert_close(64 * one.reconstruct(x), other.reconstruct(64 * x), rtol=0, atol=0)


def test_without_normalise_nothing_is_scaled(store, table):
    recipe = recipe_of(table, sae={"normalise": False})
    assert Training.begin(train.open_feed(Lineage(store, recipe)), recipe).scales == (1.0,)


def test_the_decoder_bias_starts_at_the_mean(stored, table):
    training = Training.begin(train.open_feed(Lineage(stored, recipe_of(table))), recipe_of(table))
    wanted = torch.from_numpy(a_table().mean(0)) * training.scales[0]
    torch.testing.assert_close(training.sae.b_dec.detach(), wanted, rtol=1e-5, atol=1e-6)
    spread = torch.from_numpy(a_table() - a_table().mean(0)).mul(training.scales[0]).square().sum(1).mean()
    assert spread.item() == pytest.approx(12, rel=1e-4)  # the width


def test_activations_that_are_all_equal_are_refused(tmp_path):
    store = Store.create(tmp_path / "store")
    recipe = recipe_of(write_table(tmp_path / "t.npy", np.ones((50, 3), np.float32)))
    import_table.run(Lineage(store, recipe), quiet())
    with pytest.raises(UserError, match=r"All activations are equal.*Check the site and the corpus"):
        train.run(Lineage(store, recipe), quiet())


def test_a_loss_that_is_no_number_ends_the_training_with_the_longest_row_and_a_way_out(store, table):
    recipe = recipe_of(table, sae={"architecture": "relu", "unit_norm": False}, train={"lr": 1e30})
    with pytest.raises(UserError) as caught:
        train.run(Lineage(store, recipe), quiet())
    said = re.fullmatch(
        r"brought: The loss is (?:nan|inf) at step (\d+)\. Lower train\.lr \(it is 1e\+30\), or set "
        r"train\.clip_norm\.\n"
        r"All activations of the batch are finite; the longest is that at part (\d+), sequence (\d+), position 0, "
        r"of length ([\d.]+)\.",
        str(caught.value),
    )
    step, part, row = map(int, said.groups()[:3])
    assert row // 300 == part
    batch = next(train.open_feed(Lineage(store, recipe)).batches(skip=step))
    norms = batch.double().norm(dim=1)
    assert float(said[4]) == pytest.approx(norms.max().item(), rel=1e-3)
    np.testing.assert_array_equal(a_table()[row], batch[norms.argmax()])
    assert not Lineage(store, recipe).sae.exists()


def test_a_row_that_is_not_finite_is_named_with_its_part_sequence_and_position(stored, table, monkeypatch):
    recipe = recipe_of(table)
    feed = train.open_feed(Lineage(stored, recipe))
    training = Training.begin(feed, recipe)
    training.step = 4
    values = next(feed.batches(skip=4)).clone()
    place = feed.locate(4, 17)
    values[17, 3] = float("nan")
    with pytest.raises(UserError) as caught:
        training.advance(FeedBatch(4, (values,), feed))
    assert str(caught.value) == (
        f"brought: The loss is nan at step 4. The activation at part {place.part}, sequence {place.sequence}, "
        "position 0 is not finite. Check what is stored with `saeflow verify --full`."
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_clipped_gradient_is_no_longer_than_asked_and_the_log_says_how_long_it_was(
    store, table, architecture, monkeypatch
):
    lengths = []
    step = torch.optim.Adam.step

    def measuring(self, *arguments):
        gradients = [
            p.grad.double().square().sum() for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        lengths.append(float(torch.stack(gradients).sum().sqrt()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", measuring)
    recipe = recipe_of(table, sae={"architecture": architecture}, train={"clip_norm": 0.05, "log_every": 1})
    train.run(Lineage(store, recipe), quiet())
    clipped = lengths.copy()
    logged = log_of(store, recipe)["grad_norm"]
    assert len(logged) == len(clipped) == 20
    assert max(logged) > 0.05
    np.testing.assert_allclose(clipped, np.minimum(logged, 0.05), rtol=1e-4)


def test_the_log_has_columns_of_schedules_only_where_they_are_on(store, table, monkeypatch):
    plain = recipe_of(table)
    train.run(Lineage(store, plain), quiet())
    columns = {
        "step", "batch_rows", "lr", "loss", "variance_unexplained", "l0", "dead", "auxiliary_loss", "sparsity_loss"
    }  # fmt: skip
    assert set(log_of(store, plain)) == columns


class Recorder:
    """Stands before `training_loss` and notes what is asked of it beyond the batch."""

    def __init__(self, monkeypatch):
        self.asked: list[dict[str, float]] = []
        real = SparseAutoencoder.training_loss

        def recording(sae, x, aux_weight, dead_after_tokens, **asked):
            self.asked.append(asked)
            return real(sae, x, aux_weight, dead_after_tokens)

        monkeypatch.setattr(SparseAutoencoder, "training_loss", recording)


def test_k_falls_during_a_training(store, table, monkeypatch):
    recorder = Recorder(monkeypatch)
    recipe = recipe_of(table, train={"k_start": 14, "k_anneal_share": 0.5, "log_every": 1})
    train.run(Lineage(store, recipe), quiet())
    wanted = [schedules.active_features(step, 20, recipe.sae, recipe.train) for step in range(20)]
    assert wanted[:11] == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert [asked.get("k", 4) for asked in recorder.asked] == wanted == log_of(store, recipe)["k"]


def test_tokens_choose_by_themselves_at_the_start_of_a_training(store, table, monkeypatch):
    recorder = Recorder(monkeypatch)
    train.run(Lineage(store, recipe_of(table, train={"token_topk_share": 0.6})), quiet())
    assert [asked["by_token"] for asked in recorder.asked] == [True] * 12 + [False] * 8


def test_the_penalty_rises_during_a_training(store, table, monkeypatch):
    recorder = Recorder(monkeypatch)
    recipe = recipe_of(
        table, sae={"architecture": "relu"}, train={"sparsity_warmup_share": 0.25, "log_every": 1, "decay": "cosine"}
    )
    train.run(Lineage(store, recipe), quiet())
    asked = [asked.get("sparsity", 1.0) for asked in recorder.asked]
    assert asked == pytest.approx([0.2, 0.4, 0.6, 0.8] + 16 * [1.0])
    log = log_of(store, recipe)
    assert log["sparsity_factor"] == asked
    assert log["lr"] == [schedules.learning_rate(step, 20, recipe.train) for step in range(20)]


def test_a_training_shorter_than_a_batch_is_one_step(store, table):
    recipe = recipe_of(table, train={"n_tokens": 1})
    train.run(Lineage(store, recipe), quiet())
    assert log_of(store, recipe)["step"] == [0]


def test_every_setting_that_changes_the_weights_makes_another_autoencoder(stored, table):
    def fp(**changes) -> str:
        return Lineage(stored, recipe_of(table, **changes)).sae.fp

    same = fp()
    assert same == fp(train={"checkpoint_seconds": 5.0}, evaluate={"max_tokens": 7}, features={"batch_rows": 9})
    others = [fp(sae={"seed": 1}), fp(sae={"k": 3}), fp(train={"lr": 0.1}), fp(feed={"seed": 1})]
    assert len({same, *others}) == 5


def test_only_jumprelu_that_aims_at_k_is_another_autoencoder_since_its_thresholds_follow_k(stored, table):
    def facts(**sae) -> dict:
        return Lineage(stored, recipe_of(table, sae=sae)).sae_facts

    assert facts(architecture="jumprelu")["thresholds"] == "follow k"
    others = [{"architecture": each} for each in ARCHITECTURES if each != "jumprelu"]
    for sae in (*others, {"architecture": "jumprelu", "penalty": "tanh"}):
        assert "thresholds" not in facts(**sae)


def test_the_rate_that_nobody_named_is_part_of_the_identity_as_if_it_were_named(stored, table):
    recipe = recipe_of(table)
    rate = schedules.with_rate(recipe, Lineage(stored, recipe).site.width).lr
    assert Lineage(stored, recipe).sae_facts["train"]["lr"] == rate
    assert Lineage(stored, recipe).sae.fp == Lineage(stored, recipe_of(table, train={"lr": rate})).sae.fp
    assert Lineage(stored, recipe_of(table, sae={"architecture": "relu"})).sae_facts["train"]["lr"] == 1e-3


def test_a_training_beside_an_earlier_one_says_which_setting_makes_the_difference(store, table):
    said = []
    loud = Progress(verbosity=-1)
    loud.say = lambda text, verbosity=0: said.append(text)
    train.run(Lineage(store, recipe_of(table, sae={"architecture": "jumprelu", "penalty": "tanh"})), loud)
    assert not any("a new artefact" in text for text in said)
    train.run(Lineage(store, recipe_of(table, sae={"architecture": "jumprelu"})), loud)
    (why,) = (text for text in said if "a new artefact" in text)
    assert all(name in why for name in ("sae.penalty", "thresholds", "train.lr"))


def test_another_generation_of_activations_makes_another_autoencoder(store, table):
    recipe = recipe_of(table)
    before = Lineage(store, recipe).sae.fp
    artefact = Lineage(store, recipe).activations
    artefact.publish(artefact.published().parts[:-1])
    assert Lineage(store, recipe).sae.fp != before


def append(store: Store, recipe: Recipe) -> None:
    """Show the activations as a further generation, which holds others than the last one."""
    artefact = Lineage(store, recipe).activations
    n_parts = len(artefact.published().parts)
    artefact.publish(list(artefact.parts().values())[: n_parts - 1 if n_parts > 1 else None])


def test_a_killed_training_goes_on_with_what_it_has_seen_although_more_was_appended(store, stored, table, tmp_path):
    recipe = recipe_of(table, train={"checkpoint_seconds": 1e-9})
    shutil.copytree(stored.root, tmp_path / "undisturbed")
    undisturbed = train.run(Lineage(Store(tmp_path / "undisturbed"), recipe), quiet())
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(2000, Killed))
    append(store, recipe)
    said, loud = [], Progress(verbosity=-1)
    loud.say = lambda text, verbosity=0: said.append(text)
    made = train.run(Lineage(store, recipe, fresh=True), loud)
    assert any(line.startswith("train: on generation 1 of ") and "2 is there by now" in line for line in said)
    assert any("continuing at step" in line for line in said)
    assert tree(made.path) == tree(undisturbed.path)
    assert made.record.facts["generation"] == 1
    assert not list(store.root.glob("tmp/*.checkpoint"))
    assert train.run(Lineage(store, recipe, fresh=True), quiet()).record.facts["generation"] == 2


def test_a_killed_training_begins_anew_where_what_it_has_seen_is_there_no_more(store, table):
    recipe = recipe_of(table, train={"checkpoint_seconds": 1e-9})
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(2000, Killed))
    append(store, recipe)
    Lineage(store, recipe).activations.list_path(1).unlink()
    assert train.run(Lineage(store, recipe), quiet()).record.facts["generation"] == 2


def test_an_autoencoder_says_what_it_was_trained_on_whatever_was_appended_meanwhile(store, stored, table, tmp_path):
    recipe = recipe_of(table)
    shutil.copytree(stored.root, tmp_path / "undisturbed")
    undisturbed = train.run(Lineage(Store(tmp_path / "undisturbed"), recipe), quiet())
    held = Lineage(store, recipe).activations.published().total("n_train_tokens")

    def listen(bar: Bar) -> None:
        if bar.stage == "train" and Lineage(store, recipe).activations.published().number == 1:
            append(store, recipe)

    made = train.run(Lineage(store, recipe), Progress(verbosity=-1, listener=listen))
    assert Lineage(store, recipe).activations.published().number == 2
    assert tree(made.path) == tree(undisturbed.path)
    assert made.fp == fingerprint(made.record.facts)
    assert n_tokens_seen(made) == held


def test_activations_that_were_removed_and_made_again_are_trained_on_though_their_generations_begin_anew(store, table):
    recipe = recipe_of(table)
    stored = Lineage(store, recipe).activations
    append(store, recipe)
    first = train.run(Lineage(store, recipe), quiet())
    parts = list(stored.parts().values())
    shutil.rmtree(stored.path / "generations")
    (stored.path / "manifest.json").unlink()
    for shown in (parts, parts[:1]):
        stored.publish(shown)
    second = train.run(Lineage(store, recipe, fresh=True), quiet())
    assert first.record.facts["generation"] == second.record.facts["generation"] == 2
    assert second.fp == fingerprint(second.record.facts) != first.fp
    assert n_tokens_seen(second) == stored.published().total("n_train_tokens")
    assert Lineage(store, recipe).sae == second == train.run(Lineage(store, recipe, fresh=True), quiet())


def test_the_autoencoder_trained_last_is_the_recipes_own_though_its_generation_has_a_smaller_number(store, table):
    recipe = recipe_of(table)
    append(store, recipe)
    train.run(Lineage(store, recipe), quiet())
    stored = Lineage(store, recipe).activations
    shutil.rmtree(stored.path / "generations")
    (stored.path / "manifest.json").unlink()
    stored.publish(stored.parts().values())
    made = train.run(Lineage(store, recipe, fresh=True), quiet())
    assert made.record.facts["generation"] == 1
    assert Lineage(store, recipe).sae == made


def test_an_autoencoder_with_a_lost_file_is_trained_again_to_the_same_bytes(store, table):
    recipe = recipe_of(table)
    path = train.run(Lineage(store, recipe), quiet()).path
    before = tree(path)
    (path / "sae_weights.safetensors").unlink()
    train.run(Lineage(store, recipe), quiet())
    assert tree(path) == before


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_gets_every_row_of_the_log_once_also_after_a_kill(store, table, tmp_path):
    folder = tmp_path / "board"
    recipe = recipe_of(table, train={"tensorboard": str(folder), "checkpoint_seconds": 1e-9, "clip_norm": 1.0})
    assert Lineage(store, recipe).sae == Lineage(store, recipe_of(table, train={"clip_norm": 1.0})).sae
    with pytest.raises(KeyboardInterrupt):
        train.run(Lineage(store, recipe), stopping_after(1500, KeyboardInterrupt))
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(3000, Killed))
    target = train.run(Lineage(store, recipe), quiet())
    log = log_of(store, recipe)
    shown = scalars(folder / target.id)
    assert shown.keys() == log.keys() - {"step"}
    for name, values in shown.items():
        assert [step for step, _ in values] == log["step"], name
        np.testing.assert_allclose([value for _, value in values], log[name], rtol=1e-6)


def test_steps_that_were_lost_with_a_kill_are_shown_once(store, table, tmp_path):
    """A checkpoint is older than what TensorBoard has heard of."""
    recipe = recipe_of(table, train={"tensorboard": str(tmp_path), "log_every": 1})
    train.open_feed(Lineage(store, recipe))
    with pytest.raises(KeyboardInterrupt):
        train.run(Lineage(store, recipe), stopping_after(1500, KeyboardInterrupt))
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(3000, Killed))
    target = train.run(Lineage(store, recipe), quiet())
    assert [step for step, _ in scalars(tmp_path / target.id)["loss"]] == list(range(20))


def test_restarts_have_event_files_of_their_own(store, table, tmp_path):
    target = train.run(Lineage(store, recipe_of(table, train={"tensorboard": str(tmp_path), "restarts": 2})), quiet())
    assert sorted(path.name for path in (tmp_path / target.id).iterdir()) == ["restart-0", "restart-1"]


def test_event_files_without_tensorboard_are_refused_before_work(store, table, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        train.run(Lineage(store, recipe_of(table, train={"tensorboard": "runs"})), stopping_after(-1, Killed))
    assert str(caught.value) == (
        "train.tensorboard is 'runs', but the package tensorboard is not installed.\n"
        "Install it with `pip install tensorboard`, or take the setting out."
    )


def state_of(training: Training) -> dict[str, torch.Tensor]:
    moments = {f"{n}.{k}": v for n, state in training.adam.state_dict()["state"].items() for k, v in state.items()}
    return {**training.sae.state_dict(), **moments}


def assert_killed_and_resumed_alike(feed, recipe, folder, n_rows):
    undisturbed = fit(feed, recipe, folder / "undisturbed", quiet())
    with pytest.raises(Killed):
        fit(feed, recipe, folder / "killed", stopping_after(n_rows, Killed))
    resumed = fit(feed, recipe, folder / "killed", quiet())
    assert resumed.log == undisturbed.log
    found, wanted = state_of(resumed), state_of(undisturbed)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


EVERYTHING = {
    "checkpoint_seconds": 1e-9, "clip_norm": 0.3, "sparsity_warmup_share": 0.5, "k_start": 9, "k_anneal_share": 0.5,
    "token_topk_share": 0.4,
    "decay": "cosine", "dead_after_tokens": 500, "resample_at": [0.3, 0.6],
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_every_schedule_goes_on_exactly(stored, table, tmp_path, architecture):
    recipe = recipe_of(table, sae={"architecture": architecture}, train=EVERYTHING)
    assert_killed_and_resumed_alike(train.open_feed(Lineage(stored, recipe)), recipe, tmp_path, 2000)


LOW = {"moments": "8bit", "weights": "bfloat16"}


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "mp"])
def test_a_training_in_low_precision_goes_on_exactly(stored, table, tmp_path, architecture):
    recipe = recipe_of(table, sae={"architecture": architecture}, train=EVERYTHING | LOW)
    assert_killed_and_resumed_alike(train.open_feed(Lineage(stored, recipe)), recipe, tmp_path, 2000)


def test_a_checkpoint_in_low_precision_takes_less_room_and_what_is_published_is_float32(store, table):
    recipe = recipe_of(table, sae={"architecture": "topk"}, train=LOW | {"checkpoint_seconds": 1e-9})
    with pytest.raises(Killed):
        train.run(Lineage(store, recipe), stopping_after(2000, Killed))
    tensors = read_tensors(checkpoints_of(Lineage(store, recipe).sae) / "restart-0" / checkpoint.STATE)
    n, n_rows = tensors["sae.W_enc"].numel(), len(tensors["sae.W_enc"])
    weights_and_codes, scales = 2 * n * (2 + 1 + 1), 2 * n_rows * (4 + 4)
    assert sum(each.nbytes for each in tensors.values() if each.dim() == 2) == weights_and_codes + scales
    train.run(Lineage(store, recipe), quiet())
    published = load_sae(Lineage(store, recipe).sae.path)
    assert published.W_enc.dtype == torch.float32
    assert torch.equal(published.W_enc, published.W_enc.bfloat16().float())
    assert torch.allclose(torch.linalg.vector_norm(published.W_dec, dim=1), torch.ones(()), atol=4e-3)


@pytest.mark.parametrize("changes", [{"moments": "8bit"}, {"weights": "bfloat16"}, LOW])
def test_low_precision_is_part_of_the_identity_and_float32_is_as_if_it_were_not_named(stored, table, changes):
    def lineage(train: dict) -> Lineage:
        return Lineage(stored, recipe_of(table, train=train))

    plain, named = lineage({}), lineage({"moments": "float32", "weights": "float32"})
    assert plain.sae.fp == named.sae.fp
    assert not {"moments", "weights"} & plain.sae_facts["train"].keys()
    assert changes.items() <= lineage(changes).sae_facts["train"].items()
    assert lineage(changes).sae.fp != plain.sae.fp


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_low_precision_learns_what_float32_learns(stored, table, tmp_path, architecture):
    about = {"n_tokens": 20_000, "lr": 5e-3}
    recipes = [
        recipe_of(table, sae={"architecture": architecture, "k": 6}, train=about | changes)
        for changes in ({}, {"moments": "8bit"}, LOW)
    ]
    feed = train.open_feed(Lineage(stored, recipes[0]))
    wide, *narrow = (
        fit(feed, recipe, tmp_path / str(number), quiet()).log[-1]["variance_unexplained"]
        for number, recipe in enumerate(recipes)
    )
    assert narrow == pytest.approx([wide, wide], rel=0.05)


@pytest.mark.parametrize("name", ["moments", "weights"])
def test_low_precision_on_a_gpu_without_triton_is_refused_and_on_the_processor_it_is_not(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "triton", None)
    config = TrainConfig(**{name: LOW[name]})
    with pytest.raises(
        UserError, match=rf"train\.{name} is {LOW[name]}, which on a GPU (.|\n)*leave train\.{name} out"
    ):
        require_kernels(config, torch.device("cuda"))
    require_kernels(config, torch.device("cpu"))
    require_kernels(TrainConfig(), torch.device("cuda"))


def test_a_whitened_training_goes_on_exactly_and_takes_raw_activations_in_the_end(stored, table, tmp_path):
    recipe = recipe_of(table, sae={"architecture": "topk", "whiten": True}, train=EVERYTHING)
    feed = train.open_feed(Lineage(stored, recipe))
    assert_killed_and_resumed_alike(feed, recipe, tmp_path, 2000)
    done = fit(feed, recipe, tmp_path / "done", quiet())
    (raw,) = sample_rows(feed)
    unexplained = (done.folded().eval().reconstruct(raw) - raw).square().sum() / (raw - raw.mean(0)).square().sum()
    assert unexplained < 0.8
    assert Lineage(stored, recipe).sae.id != Lineage(stored, changed(recipe, sae={"whiten": False})).sae.id


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_learns_what_the_processor_learns_and_goes_on_exactly(stored, table, tmp_path, architecture):
    recipes = [
        recipe_of(table, sae={"architecture": architecture}, train=EVERYTHING | {"device": place})
        for place in ("cpu", "cuda")
    ]
    feed = train.open_feed(Lineage(stored, recipes[0]))
    here, there = (
        fit(feed, recipe, tmp_path / recipe.train.device, quiet()).log[-1]["variance_unexplained"] for recipe in recipes
    )
    assert there == pytest.approx(here, rel=0.1)
    assert_killed_and_resumed_alike(feed, recipes[1], tmp_path, 2000)


def test_batches_that_come_by_a_ring_train_the_same_weights(stored, table, tmp_path, monkeypatch):
    recipe = recipe_of(table, sae={"architecture": "topk"}, train={"n_tokens": 3000})
    feed = train.open_feed(Lineage(stored, recipe))
    plain = fit(feed, recipe, tmp_path / "plain", quiet())
    lanes = []

    def by_ring(read, place):
        lanes.append(FakeLane(len(lanes)))
        return uploaded(read, place, lanes[-1])

    monkeypatch.setattr(group, "uploaded", by_ring)
    monkeypatch.setattr(FakeLane, "hold_steps", lambda lane, event: lane.wait(event))  # steps are done when taken
    ringed = fit(feed, recipe, tmp_path / "ringed", quiet())
    assert lanes
    for name, value in plain.sae.state_dict().items():
        assert torch.equal(value, ringed.sae.state_dict()[name])


def test_where_it_is_trained_is_no_setting_of_an_sae(stored, table):
    here, anywhere = (recipe_of(table, train={"device": place}) for place in ("cpu", "auto"))
    assert Lineage(stored, here).sae.id == Lineage(stored, anywhere).sae.id


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(store, table):
    lineage = Lineage(store, recipe_of(table, train={"device": "cuda:99"}))
    for part in lineage.activations.published().parts:
        shutil.rmtree(lineage.activations.part_path(part))
    with pytest.raises(UserError, match=r"train\.device is 'cuda:99'"):
        train.run(lineage, quiet())


READ, TARGET = "transformer.h.0.mlp:input", "transformer.h.0.mlp"


@pytest.fixture(scope="module")
def two_sites(ingredients, tmp_path_factory):
    """What a transcoder from an MLP's input to its output needs, and the MLP itself."""
    store = Store.create(tmp_path_factory.mktemp("two") / "store")
    about = {"sites": [READ, TARGET], "dtype": "float32"}
    small = {"batch_rows": 100, "block_bytes": 8192, "pool_bytes": 40_000}
    more = {"n_tokens": 4000, "lr": 3e-3, "log_every": 1}
    data = recipe_data(
        ingredients, activations=about, sae={"site": READ, "target_site": TARGET}, feed=small, train=more
    )
    recipe = parse_recipe(data)
    tokens.run(Lineage(store, recipe), quiet())
    collect.run(Lineage(store, recipe), quiet())
    return store, recipe, load_model(recipe.model).get_submodule(TARGET)


def changed(recipe: Recipe, **changes) -> Recipe:
    """The recipe with other settings in some sections."""
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    )


def test_a_transcoder_is_given_what_the_other_site_holds_at_the_same_tokens(two_sites, monkeypatch):
    store, recipe, mlp = two_sites
    given, real = [], SparseAutoencoder.training_loss

    def recording(sae, x, *others, target, **options):
        given.append((x, target))
        return real(sae, x, *others, target=target, **options)

    monkeypatch.setattr(SparseAutoencoder, "training_loss", recording)
    feed = train.open_feed(Lineage(store, recipe))
    assert [site.name for site in feed.sites] == [READ, TARGET]
    training = Training.begin(feed, recipe)
    rows = sample_rows(feed)
    for each, scale in zip(rows, training.scales, strict=True):
        spread = (each - each.mean(0)).mul(scale).square().sum(1).mean()
        assert spread.item() == pytest.approx(16, rel=1e-4)
    assert training.scales[0] != pytest.approx(training.scales[1], rel=0.1)
    torch.testing.assert_close(training.sae.centre, rows[0].mean(0) * training.scales[0])
    torch.testing.assert_close(training.sae.b_dec.detach(), rows[1].mean(0) * training.scales[1])
    batches = feed.aligned()
    for number in range(3):
        training.advance(FeedBatch(number, next(batches), feed))
    batches.close()
    for x, target in given:
        with torch.no_grad():
            wanted = mlp(x / training.scales[0])
        torch.testing.assert_close(target / training.scales[1], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("topk", "jumprelu") else pytest.param(name, marks=pytest.mark.long)
        for name in ARCHITECTURES
        if name != "mp"
    ],
)
def test_a_transcoder_learns_and_goes_on_exactly(two_sites, tmp_path, architecture):
    store, recipe, _ = two_sites
    recipe = changed(recipe, sae={"architecture": architecture, "k": 8, "l1_weight": 0.01}, train=EVERYTHING)
    feed = train.open_feed(Lineage(store, recipe))
    assert_killed_and_resumed_alike(feed, recipe, tmp_path, 2000)
    again = fit(feed, changed(recipe, train={"resample_at": []}), tmp_path / "again", quiet())
    shares = [row["variance_unexplained"] for row in again.log]
    assert np.mean(shares[-3:]) < 0.8 * np.mean(shares[:3])


def test_the_error_by_which_restarts_are_compared_is_that_of_a_transcoders_target(two_sites, tmp_path):
    store, recipe, _ = two_sites
    feed = train.open_feed(Lineage(store, recipe))
    training = fit(feed, recipe, tmp_path, quiet())
    rows = sample_rows(feed)
    x, target = (each * scale for each, scale in zip(rows, training.scales, strict=True))
    wanted = (training.sae.eval().reconstruct(x) - target).square().mean().item()
    assert training.error(rows) == pytest.approx(wanted)


def test_the_folded_transcoder_is_made_for_activations_as_they_are(two_sites, tmp_path):
    store, recipe, _ = two_sites
    feed = train.open_feed(Lineage(store, recipe))
    training = fit(feed, recipe, tmp_path, quiet())
    rows = sample_rows(feed)[0][:200]
    read, target = training.scales
    scaled = training.sae.eval().reconstruct(rows * read) / target
    torch.testing.assert_close(training.folded().eval().reconstruct(rows), scaled, rtol=1e-2, atol=1e-2)


def test_a_target_site_that_is_not_stored_is_refused_with_the_nearest(two_sites):
    store, recipe, _ = two_sites
    with pytest.raises(UserError) as caught:
        train.run(Lineage(store, changed(recipe, sae={"target_site": "transformer.h.0.mpl"})), quiet())
    assert str(caught.value) == (
        f"sae.target_site is 'transformer.h.0.mpl'; the sites are: {READ}, {TARGET}. Nearest: {TARGET}. "
        "Set sae.target_site to one of them."
    )


def test_a_target_site_that_is_the_one_read_is_refused(two_sites):
    store, recipe, _ = two_sites
    with pytest.raises(UserError, match=f"sae.target_site is {READ}, .*\nLeave sae.target_site out"):
        train.run(Lineage(store, changed(recipe, sae={"target_site": READ})), quiet())


def test_a_target_that_runs_before_what_is_read_is_refused_before_activations_are_stored(two_sites):
    store, recipe, _ = two_sites
    back = changed(recipe, sae={"site": TARGET, "target_site": READ}, activations={"sites": [TARGET, READ]})
    with pytest.raises(UserError, match=r"which the model runs before sae\.site"):
        collect.open_collector(Lineage(store, back), [])


def test_another_target_site_makes_another_autoencoder(two_sites):
    store, recipe, _ = two_sites
    assert Lineage(store, recipe).sae != Lineage(store, changed(recipe, sae={"target_site": None})).sae


def test_the_disk_contract_explains_every_column_of_the_log(store, table):
    page = (Path(__file__).resolve().parents[2] / "data" / "README.md").read_text("utf-8")
    section = page.split("`log.parquet` has a row")[1].partition("| --- |")[2].partition("\n\n")[0]
    named = {key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    recipe = recipe_of(table, train={"clip_norm": 1.0, "k_start": 8, "sparsity_warmup_share": 0.1})
    train.run(Lineage(store, recipe), quiet())
    assert named == set(log_of(store, recipe))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("size", [1e18, 1e25, 1e37])
def test_no_sae_with_nan_or_infinite_weights_is_published_however_large_activations_are(tmp_path, size, normalise):
    path, store = write_table(tmp_path / "large.npy", a_table() * np.float32(size)), Store.create(tmp_path / "store")
    changes = {"activations": {"source": str(path), "part_rows": 300, "dtype": "float32"}}
    data = brought_data(path, **changes, sae={"normalise": normalise}, train={"n_tokens": 3_000})
    recipe = parse_recipe(data)
    import_table.run(Lineage(store, recipe), quiet())
    try:
        trained = train.run(Lineage(store, recipe), quiet())
    except UserError:
        assert store.artefacts("saes") == []
    else:
        weights = load_file(trained.path / "sae_weights.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())
