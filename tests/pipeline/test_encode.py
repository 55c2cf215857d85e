"""Every non-zero value of the corpus: as brute force in float64 finds it, however the work is cut."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.corpus.selection import TokenSelection
from saeflow.features import part_encoder
from saeflow.features.part_encoder import PartEncoder, PartWriter, encode_together, part_inputs
from saeflow.model.sites import Site
from saeflow.pipeline import collect, encode, tokens, train
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Ancestors, Lineage
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect, parts_to_check
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.recipe.settings import FeaturesConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.load import load_sae
from saeflow.store import verify
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.store import Store
from tests.support.small_pipeline import a_table, brought_data, quiet, recipe_data, tree, value_file, write_table

ARCHITECTURES = ["relu", "topk", "batchtopk"]
MARGIN = 1e-9


@dataclass
class BruteForce:
    """Dense float64 values (N, F) of all real tokens, and where rounding, cut or k-th place is too near to call."""

    token_ids: np.ndarray
    wanted: np.ndarray
    unclear: np.ndarray


def to_11_bits(values: np.ndarray) -> np.ndarray:
    """Round the significand to 11 bits, ties to even, keeping the exponent."""
    significand, exponent = np.frexp(values)
    return np.ldexp(np.rint(significand * 2**11) / 2**11, exponent)


def stored_rows(store: Store, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """token_id and activation vector (float64) of every real token, straight from the tables and arrays."""
    source, target = Lineage(store, recipe).tokens, Lineage(store, recipe).activations
    (site,) = (s for s in stored_sites(target) if recipe.sae.site in (None, s.name))
    token_ids, values = [], []
    for token_part, part in zip(source.published().parts, target.published().parts, strict=True):
        table = pq.read_table(source.part_path(token_part) / "tokens.parquet")
        mask = table.column("mask").to_numpy(zero_copy_only=False)
        token_ids.append(table.column("token_id").to_numpy()[mask])
        rows = shards.open_site(target, part, site).read(slice(None))
        values.append(rows.reshape(-1, site.width).double().numpy()[mask])
    return np.concatenate(token_ids), np.concatenate(values)


def brute_force(store: Store, recipe: Recipe) -> BruteForce:
    folder = Lineage(store, recipe).sae.path
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "sae_weights.safetensors").items()}
    token_ids, x = stored_rows(store, recipe)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    cut = np.zeros((len(pre), 1))
    if recipe.sae.architecture == "batchtopk":
        cut = weights["threshold"][None, :]
    if recipe.sae.architecture == "topk":
        ranked = np.sort(pre, 1)[:, ::-1]
        first_out, last_in = ranked[:, recipe.sae.k, None], ranked[:, recipe.sae.k - 1, None]
        keep = (pre >= last_in) & (pre > 0)
        near = (np.abs(pre - last_in) <= MARGIN * np.abs(pre)) & (last_in - first_out <= MARGIN * np.abs(last_in))
    else:
        keep = pre > cut
        near = np.abs(pre - cut) <= MARGIN * np.abs(pre)
    rounds_both_ways = to_11_bits(pre * (1 + MARGIN)) != to_11_bits(pre * (1 - MARGIN))
    return BruteForce(token_ids, np.where(keep, to_11_bits(pre), 0), near | (keep & rounds_both_ways))


def table_of(artefact: Artefact, name: str) -> pa.Table:
    """All files of one table, parts end to end."""
    parts = artefact.published().parts
    paths = [artefact.part_path(p) / f.name for p in parts for f in p.files if f.name.startswith(name)]
    return pa.concat_tables([pq.read_table(path) for path in paths])


def values_of(artefact: Artefact, name: str = "token_major") -> list[tuple[int, int, float]]:
    table = table_of(artefact, name)
    return sorted(zip(*(table.column(c).to_pylist() for c in ("token_id", "feature_id", "value")), strict=True))


def encoded(where: Store, recipe: Recipe) -> Artefact:
    return encode.run(Lineage(where, recipe), quiet())


@pytest.fixture(scope="module")
def trained(ingredients, tmp_path_factory):
    """A small trained run of each architecture on the real model; padding, parts and held-out documents included."""
    store = Store.create(tmp_path_factory.mktemp("trained") / "store")
    recipes = {}
    for architecture in ARCHITECTURES:
        sae = {"architecture": architecture, "l1_weight": 0.3}
        data: dict[str, Any] = recipe_data(ingredients, name=architecture, sae=sae, tokens={"packing": "isolated"})
        recipe = recipes[architecture] = parse_recipe(data)
        for stage in (tokens.run, collect.run, train.run, encode.run):
            stage(Lineage(store, recipe), quiet())
    return store, recipes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_where_equals_brute_force_for_every_feature(trained, architecture):
    store, recipe = trained[0], trained[1][architecture]
    force = brute_force(store, recipe)
    place = {token_id: row for row, token_id in enumerate(force.token_ids.tolist())}
    assert force.unclear.mean() < 1e-4
    n_values = 0
    with connect(store, architecture, threads=1) as connection:
        for feature in range(recipe.sae.n_features):
            answer = ask(connection, "tokens_where", [feature])
            got = np.zeros(len(force.token_ids))
            got[[place[token_id] for token_id in answer.column("token_id").to_pylist()]] = answer.column("value")
            clear = ~force.unclear[:, feature]
            np.testing.assert_array_equal(got[clear], force.wanted[clear, feature])
            n_values += answer.num_rows
    assert n_values == Lineage(store, recipe).features.published().total("n_values") > 5000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_where_with_a_threshold_keeps_exactly_the_larger_values(trained, architecture):
    store, recipe = trained[0], trained[1][architecture]
    rows = values_of(Lineage(store, recipe).features)
    with connect(store, architecture, threads=1) as connection:
        for feature in range(0, recipe.sae.n_features, 7):
            mine = [(token_id, value) for token_id, f, value in rows if f == feature]
            cut = float(np.median([value for _, value in mine] or [1.0]))
            answer = ask(connection, "tokens_where", [feature, cut])
            got = list(zip(answer.column("token_id").to_pylist(), answer.column("value").to_pylist(), strict=True))
            assert got == [(token_id, value) for token_id, value in mine if value > cut]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_orders_hold_the_same_values_each_sorted(trained, architecture):
    artefact = Lineage(trained[0], trained[1][architecture]).features
    by_token, by_feature = table_of(artefact, "token_major"), table_of(artefact, "feature_major")
    assert [f"{f.name} {f.type}" for f in by_token.schema] == ["token_id int64", "feature_id int32", "value float"]
    assert [f"{f.name} {f.type}" for f in by_feature.schema] == ["feature_id int32", "token_id int64", "value float"]
    pairs = list(zip(by_token.column("token_id").to_pylist(), by_token.column("feature_id").to_pylist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert values_of(artefact, "token_major") == values_of(artefact, "feature_major")
    for part in artefact.published().parts:
        files = [artefact.part_path(part) / f.name for f in part.files if f.name.startswith("feature_major")]
        for table in map(pq.read_table, files):
            order = list(zip(table.column("feature_id").to_pylist(), table.column("token_id").to_pylist(), strict=True))
            assert order == sorted(order)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_what_counting_the_values_gives(trained, architecture):
    recipe = trained[1][architecture]
    artefact = Lineage(trained[0], recipe).features
    for part in artefact.published().parts:
        rows = pq.read_table(value_file(artefact.part_path(part)))
        ids, values = (rows.column(name).to_numpy() for name in ("feature_id", "value"))
        stats = pq.read_table(artefact.part_path(part) / "feature_stats.parquet").to_pydict()
        wide, n = values.astype(np.float64), recipe.sae.n_features
        assert stats["feature_id"] == list(range(n))
        assert stats["n_tokens"] == np.bincount(ids, minlength=n).tolist()
        np.testing.assert_allclose(stats["sum_value"], np.bincount(ids, wide, n), rtol=1e-12)
        np.testing.assert_allclose(stats["sum_squares"], np.bincount(ids, wide**2, n), rtol=1e-12)
        assert stats["max_value"] == [wide[ids == feature].max(initial=0.0) for feature in range(n)]
        assert part.counts["n_values"] == len(values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_checks_of_a_real_run_find_nothing(trained, architecture):
    with connect(trained[0], architecture, threads=1) as connection:
        assert {name: rows.num_rows for name, rows in check(connection) if rows.num_rows} == {}


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """A trained SAE on a brought table, to be encoded in many ways."""
    folder = tmp_path_factory.mktemp("brought")
    source = write_table(folder / "t.npy", a_table())
    store = Store.create(folder / "store")
    recipe = parse_recipe(brought_data(source, sae={"k": 5}))
    for stage in (import_table.run, train.run):
        stage(Lineage(store, recipe), quiet())
    return store, recipe, source


def encoder_of(brought, stored: Artefact, name: str) -> PartEncoder:
    """The one trained SAE before other activations and a new artefact."""
    store, recipe, _ = brought
    source = store.input_of(stored, "tokens")
    target = store.artefact("features", name, "00000000")
    target.create({"context_length": 1, "n_features": recipe.sae.n_features}, [source.id, stored.id, "saes/x-0"])
    sae = load_sae(Lineage(store, recipe).sae.path)
    return PartEncoder(TokenSelection(source), stored, target, Site("table", 12), sae, recipe.features.batch_rows)


def encode_all(encoder: PartEncoder) -> Artefact:
    with quiet().bar("features", None, "tokens") as bar:
        encoder.target.publish([encode_together([encoder], part, bar)[0] for part in encoder.stored.published().parts])
    return encoder.target


@pytest.mark.parametrize("part_rows", [pytest.param(1, marks=pytest.mark.long), 64, 10_000])
def test_values_do_not_depend_on_the_size_of_parts(brought, part_rows):
    store, recipe, source = brought
    usual = values_of(encoded(store, recipe))
    n_rows = 40 if part_rows == 1 else 700
    table = write_table(source.with_name(f"{part_rows}.npy"), a_table()[:n_rows])
    cut = parse_recipe(brought_data(table, activations={"part_rows": part_rows}))
    _, stored = import_table.run(Lineage(store, cut), quiet())
    assert len(stored.published().parts) == -(-n_rows // part_rows)
    assert values_of(encode_all(encoder_of(brought, stored, f"parts{part_rows}"))) == [
        row for row in usual if row[0] < n_rows
    ]


@pytest.mark.parametrize("batch_rows", [1, 7, 256, 100_000])
def test_the_files_do_not_depend_on_the_size_of_batches(brought, batch_rows):
    store, recipe, _ = brought
    usual = tree(encoded(store, recipe).path / "parts")
    encoder = encoder_of(brought, Lineage(store, recipe).activations, f"batches{batch_rows}")
    encoder.batch_rows = batch_rows
    assert tree(encode_all(encoder).path / "parts") == usual


@pytest.mark.long
@pytest.mark.parametrize("limit", [1, 500])
def test_a_part_with_more_values_than_memory_holds_gets_more_files_with_the_same_rows(brought, monkeypatch, limit):
    store, recipe, _ = brought
    usual = encoded(store, recipe)
    monkeypatch.setattr(part_encoder, "SEGMENT_VALUES", limit)
    encoder = encoder_of(brought, Lineage(store, recipe).activations, f"segments{limit}")
    encoder.batch_rows = 50
    cut = encode_all(encoder)
    n_files = [len([f for f in part.files if f.name.startswith("token_major/")]) for part in cut.published().parts]
    assert n_files[0] > 1
    for name in ("token_major", "feature_major"):
        assert values_of(cut, name) == values_of(usual, name)
    assert [p.counts for p in cut.published().parts] == [p.counts for p in usual.published().parts]
    for one, other in zip(cut.published().parts, usual.published().parts, strict=True):
        a, b = (
            pq.read_table(artefact.part_path(part) / "feature_stats.parquet").to_pydict()
            for artefact, part in ((cut, one), (usual, other))
        )
        assert a["n_tokens"] == b["n_tokens"]
        assert a["max_value"] == b["max_value"]
        np.testing.assert_allclose(a["sum_value"], b["sum_value"], rtol=1e-12)
    with connect(store, cut.name, threads=1) as connection:
        answer = ask(connection, "tokens_where", [3])
    assert answer.num_rows == sum(row[1] == 3 for row in values_of(usual))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PAR1")])
def test_a_lost_part_is_encoded_again_to_the_same_bytes(tmp_path, trained, damage):
    store, recipes = trained
    shutil.copytree(store.root, tmp_path / "store")
    copy = Store(tmp_path / "store")
    artefact = Lineage(copy, recipes["topk"]).features
    before = tree(artefact.path)
    damage(value_file(artefact.part_path(artefact.published().parts[1])))
    encoded(copy, recipes["topk"])
    assert tree(artefact.path) == before


def test_encoding_before_training_says_what_to_run(tmp_path, progress):
    store = Store.create(tmp_path / "store")
    recipe = parse_recipe(brought_data(write_table(tmp_path / "t.npy", a_table(50))))
    import_table.run(Lineage(store, recipe), progress)
    with pytest.raises(UserError, match=r"saes/brought-.* is not trained\. Run `saeflow train"):
        encode.run(Lineage(store, recipe), progress)


def test_a_run_names_what_it_was_made_from(trained):
    store, recipes = trained
    record = Lineage(store, recipes["relu"]).features.record
    kinds = [name.split("/")[0] for name in record.inputs]
    assert kinds == ["tokens", "activations", "saes"]
    assert all(store.by_id(name).exists() for name in record.inputs)
    assert record.facts["n_features"] == 64
    assert read_json(Lineage(store, recipes["relu"]).sae.path / "cfg.json")["d_sae"] == 64


def miscounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on one feature of each new part is said to fire once more often than it does."""

    def wrong(self: PartWriter) -> None:
        self.statistics.n_tokens[0] += 1
        close(self)

    close = PartWriter.close
    monkeypatch.setattr(PartWriter, "close", wrong)


def test_parts_that_break_a_check_are_never_published_and_are_made_again(trained, tmp_path, monkeypatch):
    recipe = trained[1]["topk"]
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    whole = tree(Lineage(store, recipe).features.path)
    shutil.rmtree(Lineage(store, recipe).features.path)
    with monkeypatch.context() as patch:
        miscounting(patch)
        with pytest.raises(UserError, match=r"break \d+ checks: .*stats_agree \(1 rows\)"):
            encoded(store, recipe)
    assert Lineage(store, recipe).features.generation() is None
    assert Lineage(store, recipe).features.part_folders() == set()
    assert tree(encoded(store, recipe).path) == whole


def test_checks_after_an_encoding_look_at_the_values_asked_for(trained, tmp_path, monkeypatch):
    recipe = trained[1]["topk"]
    parts = Lineage(trained[0], recipe).features.published().parts
    n_values = [part.counts["n_values"] for part in parts]
    assert parts_to_check(parts, 0) == []
    assert parts_to_check(parts, 1) == [parts[-1]]
    assert parts_to_check(parts, n_values[-1] + n_values[-2]) == list(parts[-2:])
    assert parts_to_check(parts, sum(n_values)) == list(parts)
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    shutil.rmtree(Lineage(store, recipe).features.path)
    miscounting(monkeypatch)
    unchecked = recipe.model_copy(update={"features": FeaturesConfig(check_values=0)})
    assert encoded(store, unchecked).published().total("n_values") == sum(n_values)


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_table_beside_the_parts_that_is_damaged_is_made_again(trained, tmp_path, how):
    recipe = trained[1]["topk"]
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    run = Lineage(store, recipe).features
    whole = tree(run.path)
    path = run.path / "similar.parquet"
    path.write_bytes(path.read_bytes()[:-10]) if how == "cut" else path.unlink()
    assert tree(encoded(store, recipe).path) == whole


def test_a_table_whose_bytes_have_changed_keeps_its_record_and_is_found(trained, tmp_path):
    recipe = trained[1]["topk"]
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    run = Lineage(store, recipe).features
    content = bytearray((run.path / "similar.parquet").read_bytes())
    content[40] ^= 1
    (run.path / "similar.parquet").write_bytes(content)
    shutil.rmtree(run.part_path(run.published().parts[0]))
    encoded(store, recipe)
    assert "similar.parquet has changed" in " ".join(map(str, verify.find_damage(run, full=True)))


def test_a_run_killed_before_its_first_publication_is_finished_by_the_next(trained, tmp_path, monkeypatch):
    recipe = trained[1]["topk"]
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    whole = tree(Lineage(store, recipe).features.path)
    shutil.rmtree(Lineage(store, recipe).features.path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Artefact, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            encoded(store, recipe)
    assert tree(encoded(store, recipe).path) == whole


def test_a_part_that_vanished_since_it_was_encoded_is_not_left_out_silently(trained, tmp_path):
    recipe = trained[1]["topk"]
    store = Store.open(shutil.copytree(trained[0].root, tmp_path / "store"))
    run = Lineage(store, recipe).features
    before = run.published()
    used = Ancestors(store, run).selection()
    inputs = {part.index: part_inputs(used, part) for part in Lineage(store, recipe).activations.published().parts}
    shutil.rmtree(run.part_path(before.parts[1]))
    with pytest.raises(UserError, match=r"Part 1 of .* is gone"):
        encode.publish(store, run, used, inputs, quiet())
    assert run.published() == before
