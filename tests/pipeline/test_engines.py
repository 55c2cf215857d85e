"""Activations of an inference engine: the same answers as if saeflow had run the model, whatever the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from saeflow.activations.shards import open_site
from saeflow.corpus import token_parts
from saeflow.pipeline import stages
from saeflow.pipeline.lineage import Lineage
from saeflow.query.connection import connect
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.store.store import Store
from tests.support.engine_folders import LAYERS, Answered, write_batches, write_transformer_lens, write_vllm
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, value_file

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


@pytest.mark.parametrize("layout", LAYOUTS)
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
