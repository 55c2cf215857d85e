"""Activations of an inference engine: the same answers as if saeflow had run the model, whatever the layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from saeflow.activations.shards import open_site
from saeflow.corpus import token_parts
from saeflow.model.load import load_model, may_run, site_names
from saeflow.model.sites import Site, list_sites
from saeflow.pipeline import collect, stages, tokens
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.query.connection import connect
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store import verify as integrity
from saeflow.store.store import Store
from tests.support.engine_folders import LAYERS, Answered, write_batches, write_transformer_lens, write_vllm
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, value_file, write_recipe

ABOUT: dict[str, Any] = {
    "tokens": {"packing": "isolated", "part_tokens": 100_000},
    "activations": {"sites": LAYERS, "dtype": "float32"},
    "sae": {"site": LAYERS[1]},
    "train": {"n_tokens": 2000},
    "features": {"check_values": 0},
}


@dataclass(frozen=True)
class Direct:
    """What saeflow itself has collected, and what an engine would have written."""

    store: Store
    lineage: Lineage
    requests: dict[str, Answered]


def states_of(lineage: Lineage) -> dict[str, Answered]:
    """The token ids and activations of each document, out of a store."""
    found = {}
    for part, stored in zip(lineage.tokens.published().parts, lineage.activations.published().parts, strict=True):
        vocab_ids, mask = token_parts.read_part(lineage.tokens, part)
        real = torch.from_numpy(mask)
        arrays = {site.name: open_site(lineage.activations, stored, site) for site in lineage.stored_sites}
        values = {name: each.read(slice(None))[real] for name, each in arrays.items()}
        rows = pq.read_table(lineage.tokens.part_file(part, "documents.parquet")).to_pylist()
        owners = pq.read_table(lineage.tokens.part_file(part, "tokens.parquet")).column("document_id")
        owner = owners.to_numpy(zero_copy_only=False)[mask.reshape(-1)]
        for row in rows:
            mine = owner == row["document_id"]
            states = {site: each[torch.from_numpy(mine)] for site, each in values.items()}
            found[row["key"]] = Answered(vocab_ids[mask][mine].tolist(), states)
    return found


@pytest.fixture(scope="module")
def direct(ingredients, tmp_path_factory) -> Direct:
    store = Store.create(tmp_path_factory.mktemp("direct") / "store")
    lineage = Lineage(store, parse_recipe(recipe_data(ingredients, **ABOUT)))
    stages.run(lineage, quiet())
    return Direct(store, lineage, states_of(lineage))


def recipe_of(ingredients: Ingredients, folder: Path, **changes: Any) -> Recipe:
    """A recipe of a folder's requests, whose documents the folder lists."""
    about = {name: ABOUT.get(name, {}) | changes.get(name, {}) for name in {*ABOUT, *changes}}
    corpus = {"files": [], "requests": str(folder), **changes.get("corpus", {})}
    return parse_recipe(recipe_data(ingredients, **about | {"corpus": corpus}))


def with_index(write: Callable[..., Path]) -> Callable[..., Path]:
    """Files with odd names, which an index gives back their documents."""

    def written(folder: Path, requests: dict[str, Answered]) -> Path:
        named = {f"cmpl-{i}-ab": key for i, key in enumerate(sorted(requests))}
        write(folder, {name: requests[key] for name, key in named.items()})
        rows = {row["key"]: row for row in documents()}
        index = [{"request_id": name, "text": rows[key]["text"], **rows[key]} for name, key in named.items()]
        (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in index))
        return folder

    return written


LAYOUTS = {
    "vllm": write_vllm,
    "vllm with an index": with_index(write_vllm),
    "transformer_lens": write_transformer_lens,
    "batches by module": write_batches,
}


QUESTIONS = [
    "select * from feature_summary order by feature_id",
    "select * from feature_quantile_examples(3)",
    "select * from top_tokens(3, 20)",
    "select document_id, key, source, held_out, n_tokens, first_token_id, title from documents",
    "select token_id, vocab_id, document_id, position from tokens order by token_id",
    "select * from feature_logits(3)",
]


def answers(store: Store) -> list[Any]:
    with connect(store) as connection:
        return [connection.execute(question).fetchall() for question in QUESTIONS]


@pytest.mark.parametrize(
    "layout", [name if name == "vllm with an index" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_an_engines_requests_give_the_answers_of_the_direct_path(direct, ingredients, tmp_path, layout):
    folder = LAYOUTS[layout](tmp_path / "requests", direct.requests)
    store = Store.create(tmp_path / "store")
    listed = {} if (folder / "requests.jsonl").exists() else {"files": [str(ingredients.corpus)]}
    lineage = Lineage(store, recipe_of(ingredients, folder, corpus=listed))
    stages.run(lineage, quiet())
    for mine, theirs in zip(lineage.features.published().parts, direct.lineage.features.published().parts, strict=True):
        paths = [value_file(owner.features.part_path(part)) for owner, part in
                 ((lineage, mine), (direct.lineage, theirs))]  # fmt: skip
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert answers(store) == answers(direct.store)


def made_up(n: int = 12, seed: int = 0) -> dict[str, Answered]:
    """Requests of 1 to 40 tokens with random activations: nobody has run a model."""
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n,), generator=dice).tolist()
    return {
        f"r{seed}-{i}": Answered(
            torch.randint(0, 300, (length,), generator=dice).tolist(),
            {site: torch.randn(length, 16, generator=dice) for site in LAYERS},
        )
        for i, length in enumerate(lengths)
    }


@dataclass(frozen=True)
class Stored:
    """A folder of made-up requests, and the store that follows it."""

    folder: Path
    recipe: Recipe
    store: Store

    def lineage(self) -> Lineage:
        return Lineage(self.store, self.recipe)

    def collected(self) -> dict[str, Answered]:
        """Do both stages, and return what is stored by document."""
        tokens.run(self.lineage(), quiet())
        collect.run(self.lineage(), quiet())
        return states_of(self.lineage())


@pytest.fixture
def stored(ingredients, tmp_path) -> Stored:
    """Several parts, in float32 so that what is stored equals what was written."""
    folder = write_vllm(tmp_path / "requests", made_up())
    recipe = recipe_of(ingredients, folder, tokens={"part_tokens": 60})
    return Stored(folder, recipe, Store.create(tmp_path / "store"))


def assert_equal(found: dict[str, Answered], wanted: dict[str, Answered]) -> None:
    assert found.keys() == wanted.keys()
    for key, each in wanted.items():
        assert found[key].ids == each.ids
        for site in LAYERS:
            torch.testing.assert_close(found[key].states[site], each.states[site], rtol=0, atol=0)


def test_what_is_stored_is_what_the_engine_wrote_and_verifies(stored):
    assert_equal(stored.collected(), made_up())
    assert stored.lineage().activations.published().parts[2:]
    assert not list(integrity.verify(stored.store, full=True))
    assert stored.lineage().activations.fact("engine") == "vllm 0.20.2"


def test_new_requests_are_appended_and_changed_ones_replaced(stored):
    stored.collected()
    before = stored.lineage().activations.published().parts
    more, changed = made_up(5, seed=1), made_up()
    changed["r0-3"] = Answered(changed["r0-3"].ids, {site: each + 1 for site, each in changed["r0-3"].states.items()})
    write_vllm(stored.folder, more | {"r0-3": changed["r0-3"]})
    assert_equal(stored.collected(), changed | more)
    assert stored.lineage().activations.published().parts[: len(before)] == before
    assert len(stored.lineage().tokens.published().hidden_ids) == 1


def test_a_killed_run_goes_on_with_the_parts_that_are_done(stored):
    requests = made_up()
    last = max(requests)
    spoilt = {site: torch.full_like(each, torch.nan) for site, each in requests[last].states.items()}
    write_vllm(stored.folder, {last: Answered(requests[last].ids, spoilt)})
    with pytest.raises(UserError, match=rf"{last}.safetensors: transformer.h.0 is nan at token 0"):
        stored.collected()
    done = stored.lineage().activations.parts()
    assert done
    write_vllm(stored.folder, {last: requests[last]})
    assert_equal(stored.collected(), requests)
    now = stored.lineage().activations.parts()
    assert {index: now[index] for index in done} == done


def test_a_request_that_cannot_be_had_is_forgotten_and_the_others_are_stored(stored):
    tokens.run(stored.lineage(), quiet())
    (stored.folder / "r0-3.safetensors").unlink()
    with pytest.raises(UserError, match=r"the file of request 'r0-3' is gone.*\n.*saeflow forget"):
        collect.run(stored.lineage(), quiet())
    forget.forget(stored.store, ["r0-3"], quiet())
    found = stored.collected()
    assert not found.pop("r0-3").states[LAYERS[0]].any()
    requests = made_up()
    del requests["r0-3"]
    assert_equal(found, requests)


def test_tokens_that_have_changed_since_are_never_given_other_vectors(stored):
    tokens.run(stored.lineage(), quiet())
    other = made_up()["r0-3"]
    write_vllm(stored.folder, {"r0-3": Answered([i + 1 for i in other.ids], other.states)})
    with pytest.raises(UserError, match=r"r0-3.safetensors has other token ids.*\n.*saeflow tokens"):
        collect.run(stored.lineage(), quiet())


def test_a_worker_of_a_cluster_makes_the_same_parts(stored):
    stored.collected()
    lineage, generation = stored.lineage(), stored.lineage().tokens.published()
    wanted = lineage.activations.parts()
    shutil.rmtree(lineage.activations.path / "parts")
    settings = {
        "recipe": stored.recipe.model_dump(mode="json"), "target": lineage.activations.id,
        "generation": generation.number, "threads": 1,
    }  # fmt: skip
    worker = collect.CollectParts.open(stored.store, settings)
    made = [worker.make(part.index, quiet())[lineage.activations.id] for part in generation.parts]
    assert [record["files"] for record in made] == [part.as_json["files"] for _, part in sorted(wanted.items())]


def test_ids_beyond_the_vocabulary_are_refused_with_their_document(stored):
    other = made_up()["r0-3"]
    write_vllm(stored.folder, {"r0-3": Answered([*other.ids[:-1], 7000], other.states)})
    with pytest.raises(UserError, match=r"corpus.requests: the document 'r0-3' has the id 7000"):
        tokens.run(stored.lineage(), quiet())


def test_a_tokenizer_without_weights_is_enough(direct, ingredients, tmp_path):
    folder = write_vllm(tmp_path / "requests", direct.requests)
    shutil.copytree(ingredients.model, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    store = Store.create(tmp_path / "store")
    lineage = Lineage(store, recipe_of(ingredients, folder, model={"path": str(tmp_path / "tokenizer")}))
    summary = stages.run(lineage, quiet())
    assert "loss_recovered" not in summary["quality"]
    assert summary["quality"]["variance_unexplained"] < 1
    with connect(store) as connection:
        facts = connection.execute("select engine from runs").fetchall()
    assert facts == [("vllm 0.20.2",)]


def test_the_command_takes_the_folder_and_says_what_to_write_into_the_recipe(saeflow, ingredients, tmp_path):
    folder = write_vllm(tmp_path / "requests", made_up())
    recipe = write_recipe(tmp_path / "small.toml", recipe_data(ingredients, corpus=None, **ABOUT))
    said = saeflow("collect", recipe, "--from", folder, "--store", tmp_path / "store")
    assert f'requests = "{folder}"' in said.out, said.err
    assert "vllm 0.20.2" in saeflow("ls", "--store", tmp_path / "store").out
    again = saeflow("collect", recipe, "--set", f"corpus.requests={folder}", "--store", tmp_path / "store")
    assert "tokens, " in again.err


def test_a_forecast_says_that_no_model_runs_and_what_to_do_instead(saeflow, ingredients, tmp_path):
    folder = write_vllm(tmp_path / "requests", made_up(2))
    data = recipe_data(ingredients, corpus=None, **ABOUT) | {"corpus": {"requests": str(folder)}}
    said = saeflow("plan", write_recipe(tmp_path / "small.toml", data), "--store", tmp_path / "store")
    assert said.code == 2
    assert "an engine's requests are stored as they are: rows × columns × 2 bytes" in said.err
    assert "saeflow run RECIPE" in said.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": {"packing": "concatenated"}}, "tokens.packing cannot be set"),
        ({"tokens": {"prepend_bos": True}}, "tokens.prepend_bos cannot be set"),
        ({"corpus": {"token_ids": "ids"}}, "corpus.token_ids cannot be set"),
    ],
)
def test_settings_that_would_change_the_engines_tokens_are_refused(ingredients, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        recipe_of(ingredients, tmp_path, **changes)


@pytest.mark.long
def test_files_are_encoded_without_storing_them_again(direct, ingredients, tmp_path):
    folder = write_vllm(tmp_path / "requests", direct.requests)
    about = {"activations": {**ABOUT["activations"], "keep": False}, "sae": {"source": str(direct.lineage.sae.path)}}
    recipe = recipe_of(ingredients, folder, **about, corpus={"files": [str(ingredients.corpus)]})
    lineage = Lineage(Store.create(tmp_path / "store"), recipe)
    stages.run(lineage, quiet())
    assert not list(lineage.activations.path.rglob("*.zarr"))
    found = [owner.features.part_path(owner.features.published().parts[0]) for owner in (lineage, direct.lineage)]
    assert value_file(found[0]).read_bytes() == value_file(found[1]).read_bytes()


def test_hooks_of_transformer_lens_are_the_models_own_sites(ingredients, tmp_path):
    names = site_names(ModelConfig(path=str(ingredients.model)))
    assert {site.name for site in list_sites(load_model(ModelConfig(path=str(ingredients.model))))} <= {*names}
    ids, states = torch.arange(5), {"blocks.0.mlp.hook_post": torch.randn(5, 32), "odd": torch.randn(5, 3)}
    save_file({"tokens": ids, **states}, tmp_path / "a.safetensors")
    sites = ["blocks.0.mlp.hook_post", "odd"]
    recipe = recipe_of(ingredients, tmp_path, activations={**ABOUT["activations"], "sites": sites}, sae={"site": "odd"})
    lineage = Lineage(Store.create(tmp_path / "store"), recipe)
    tokens.run(lineage, quiet())
    collect.run(lineage, quiet())
    assert lineage.stored_sites == [Site("odd", 3), Site("transformer.h.0.mlp.c_proj:input", 32)]
    assert may_run(recipe, "transformer.h.0.mlp.c_proj:input")
    assert not may_run(recipe, "odd")


def test_a_folder_that_is_gone_is_not_missed_once_it_is_stored(stored):
    stored.collected()
    shutil.rmtree(stored.folder)
    assert_equal(stored.collected(), made_up())


def test_a_forgotten_request_leaves_the_disk(stored):
    stored.collected()
    forget.forget(stored.store, ["r0-3"], quiet())
    (stored.folder / "r0-3.safetensors").unlink()
    compact_store(stored.lineage(), quiet())
    requests = made_up()
    del requests["r0-3"]
    assert_equal(stored.collected(), requests)
    assert not list(integrity.verify(stored.store, full=True))


def test_generated_tokens_are_the_assistants_where_the_prompt_is_known(stored):
    rows = [{"request_id": name, "n_prompt_tokens": 2} for name in made_up() if name != "r0-3"]
    (stored.folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens.run(stored.lineage(), quiet())
    source = stored.lineage().tokens
    for part in source.published().parts:
        table = pq.read_table(source.part_file(part, "tokens.parquet")).to_pylist()
        first = {row["document_id"]: row["first_token_id"] for row in
                 pq.read_table(source.part_file(part, "documents.parquet")).to_pylist()}  # fmt: skip
        for row in (each for each in table if each["mask"]):
            assert row["assistant"] == (row["token_id"] - first[row["document_id"]] >= 2)
