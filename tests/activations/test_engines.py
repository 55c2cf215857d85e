"""Files of inference engines: which site each tensor is, and what is refused before any work."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from saeflow.activations.engines.layouts import Engine
from saeflow.activations.engines.places import place_of, sites_of
from saeflow.activations.engines.reader import EngineFiles
from saeflow.corpus import sources
from saeflow.corpus.requests.folder import RequestFolder
from saeflow.model.sites import Site
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError

WIDTH = 4


def write(path: Path, n: int = 3, layers: int = 2, metadata: dict[str, str] | None = None, **others: Any) -> Path:
    """A request as vLLM writes it: n tokens, each vector its token's number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = torch.arange(n, dtype=torch.float32)[:, None, None].expand(n, layers, WIDTH)
    save_file({"token_ids": torch.arange(n), "hidden_states": states.contiguous(), **others}, path, metadata)
    return path


def write_named(path: Path, ids: torch.Tensor, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": ids, **{name.replace("__", "."): each for name, each in tensors.items()}}, path, metadata)
    return path


def read(folder: Path, **settings: Any) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    documents = sources.open_corpus(CorpusConfig(requests=str(folder), **settings)).documents
    return {each.key: (each.vocab_ids, each.metadata) for each in documents}


def complaint(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **settings)
    return str(caught.value)


def index(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.5", 6),
        ("model.layers.5:input", 5),
        ("transformer.h.0", 1),
        ("gpt_neox.layers.11.output", 12),
        ("model.layers.3.output.0", 4),
        ("model.layers.3.input", 3),
        ("blocks.2.hook_resid_post", 3),
        ("blocks.2.hook_resid_pre", 2),
        ("layers_output.7", 8),
        ("layers_input[7]", 7),
        ("transformer.h.0.mlp.act", "transformer.h.0.mlp.act"),
        ("model.layers.3.mlp.experts.2", "model.layers.3.mlp.experts.2"),
        ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out"),
        ("embed", "embed"),
    ],
)
def test_a_name_has_the_place_in_the_residual_stream_that_its_engine_means(name, place):
    assert place_of(name) == place


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_every_layer_of_a_file_is_a_site_under_the_models_name_for_it(layers):
    widths = dict.fromkeys(layers, WIDTH)
    inputs = sites_of(["model.layers.*:input"], widths)
    assert inputs == [Site(f"model.layers.{layer}:input", WIDTH) for layer in sorted(layers)]
    if outputs := [layer - 1 for layer in sorted(layers) if layer]:
        assert sites_of(["model.layers.*"], widths) == [Site(f"model.layers.{i}", WIDTH) for i in outputs]
    for site in inputs:
        assert place_of(site.name) in layers


def test_a_site_that_the_files_lack_is_named_with_those_that_they_hold():
    with pytest.raises(UserError, match=r"no site 'model.layers.9'.*the output of layer 0, the output of layer 2"):
        sites_of(["model.layers.9"], {1: WIDTH, 3: WIDTH})
    with pytest.raises(UserError, match=r"no site '\*\.5'"):
        sites_of(["*.5"], {6: WIDTH})
    with pytest.raises(UserError, match=r"no activations"):
        sites_of(["a"], {})


def test_names_that_lead_out_of_a_part_are_no_sites():
    assert sites_of(["*"], {"../../x": WIDTH, "fine.1": WIDTH}) == [Site("fine.1", WIDTH)]


def test_requests_are_documents_by_the_names_of_their_files(tmp_path):
    write(tmp_path / "b.safetensors", 2)
    write(tmp_path / "deep" / "a.1.safetensors", 3, metadata={"n_prompt_tokens": "2"})
    assert read(tmp_path) == {
        "b": ((0, 1), {"n_prompt_tokens": None}),
        "deep/a.1": ((0, 1, 2), {"n_prompt_tokens": 2}),
    }


@pytest.mark.parametrize("parquet", [False, True])
def test_an_index_gives_keys_and_metadata(tmp_path, parquet):
    write(tmp_path / "cmpl-7.safetensors", 2)
    row = {"request_id": "cmpl-7", "key": "poem", "lines": 14, "n_prompt_tokens": 1}
    index(tmp_path, row)
    if parquet:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "requests.parquet")
        (tmp_path / "requests.jsonl").unlink()
    assert read(tmp_path) == {"poem": ((0, 1), {"lines": 14, "n_prompt_tokens": 1, "request_id": "cmpl-7"})}


def test_a_batch_gives_one_request_a_row_without_its_padding(tmp_path):
    ids = torch.tensor([[9, 1, 2], [3, 4, 5], [6, 9, 9], [9, 9, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    write_named(tmp_path / "x.safetensors", ids, attention_mask=mask, a=torch.zeros(4, 3, 2))
    assert {key: ids for key, (ids, _) in read(tmp_path).items()} == {
        "x-0": (1, 2), "x-1": (3, 4, 5), "x-2": (6,), "x-3": (),
    }  # fmt: skip
    [first] = EngineFiles.of(str(tmp_path), []).read("x-2", 0, np.array([6]), [Site("a", 2)])
    assert first.tolist() == [[0, 0]]


def two_in_one(folder: Path) -> None:
    write_named(folder / "x.safetensors", torch.ones(2, 1, dtype=torch.int32), attention_mask=torch.ones(2, 1))
    write(folder / "x-1.safetensors")


def cut(folder: Path) -> None:
    path = write(folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes(path.read_bytes()[:-9])


def link(folder: Path) -> None:
    write(folder.parent / "other.safetensors")
    (folder / "x.safetensors").symlink_to(folder.parent / "other.safetensors")


def linked_folder(folder: Path) -> None:
    write(folder.parent / "others" / "x.safetensors")
    (folder / "more").symlink_to(folder.parent / "others")


def begun(folder: Path) -> None:
    write(folder / "a.safetensors")
    (folder / "b.safetensors.lock").touch()


def holes(folder: Path) -> None:
    mask = torch.tensor([[1, 0, 1]])
    write_named(folder / "x.safetensors", torch.ones(1, 3, dtype=torch.int64), attention_mask=mask)


REFUSED = {
    "one id by two files": (two_in_one, "two files give the request 'x-1'"),
    "a file that is cut": (cut, "cut.safetensors cannot be read.*Is it whole"),
    "an empty file": (lambda folder: (folder / "x.safetensors").touch(), "x.safetensors cannot be read: it is empty"),
    "a link": (link, "x.safetensors is a link"),
    "a linked folder": (linked_folder, "more is a link"),
    "a pickle": (lambda folder: (folder / "x.pt").touch(), "may run code"),
    "a packed file": (lambda folder: (folder / "x.safetensors.zst").touch(), "zstd -d"),
    "a request that was never written": (begun, "1 requests that have no file yet: 'b'"),
    "no ids": (lambda f: save_file({"hidden_states": torch.ones(1)}, f / "x.safetensors"), "no token ids"),
    "two sets of ids": (lambda f: write(f / "x.safetensors", tokens=torch.ones(3)), "token_ids and tokens"),
    "ids that are no numbers": (lambda f: write_named(f / "x.safetensors", torch.ones(3)), "must be whole numbers"),
    "a batch without a mask": (
        lambda f: write_named(f / "x.safetensors", torch.ones(2, 3, dtype=torch.int64)), "no attention_mask.*torch",
    ),
    "padding between tokens": (holes, "in row 0, padding lies between"),
    "a prompt of no length": (
        lambda f: write(f / "x.safetensors", metadata={"n_prompt_tokens": "-1"}), "n_prompt_tokens is '-1'",
    ),
    "an index and another": (
        lambda f: [index(f, {"request_id": "a"}), (f / "requests.parquet").touch()], "both requests.jsonl and",
    ),
    "an index of other columns": (lambda f: index(f, {"id": "a"}), "has no column request_id"),
    "an index that is none": (lambda f: (f / "requests.jsonl").write_text("[[[["), "requests.jsonl cannot be read"),
    "a request without a file": (
        lambda f: [write(f / "a.safetensors"), index(f, {"request_id": "a"}, {"request_id": "b"})],
        "1 requests have no file in .*: 'b'",
    ),
    "a path out of the folder": (
        lambda f: [write(f.parent / "a.safetensors"), index(f, {"request_id": "../a"})], "have no file in .*'../a'",
    ),
    "a document that is named twice": (
        lambda f: [write(f / f"{x}.safetensors") for x in "ab"]
        and index(f, {"request_id": "a", "key": "k"}, {"request_id": "b", "key": "k"}),
        "1 documents are named twice, or share a request: 'k'",
    ),
    "a request of two documents": (
        lambda f: [write(f / "a.safetensors"),
                   index(f, {"request_id": "a", "key": "k"}, {"request_id": "a", "key": "l"})],
        "named twice, or share a request",
    ),
    "an empty folder": (lambda f: None, "The corpus is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_whole_is_refused_by_name_before_any_work(tmp_path, case):
    make, said = REFUSED[case]
    folder = tmp_path / "requests"
    folder.mkdir()
    make(folder)
    assert re.search(said, complaint(folder), re.S), complaint(folder)


def test_a_request_that_is_being_written_is_waited_for(tmp_path):
    write(tmp_path / "a.safetensors")
    lock = os.open(tmp_path / "a.safetensors.lock", os.O_CREAT | os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "have no file yet: 'a'" in complaint(tmp_path)
    os.close(lock)
    assert list(read(tmp_path)) == ["a"]


def test_files_of_no_document_are_left_out_and_said(tmp_path, caplog):
    for name in "ab":
        write(tmp_path / f"{name}.safetensors")
    assert list(read(index(tmp_path, {"request_id": "b"}))) == ["b"]
    assert "1 files of no document, e.g. a" in caplog.text


def test_a_share_of_the_requests_may_be_read(tmp_path):
    for i in range(40):
        write(tmp_path / f"{i}.safetensors", 1)
    some = set(read(tmp_path, share=0.3))
    assert 2 < len(some) < 30
    assert some < set(read(tmp_path, share=0.6))


def test_the_layers_of_vllm_must_be_known_and_as_many(tmp_path):
    write(tmp_path / "a.safetensors", layers=2)
    for layers, said in ([[], "2 layers, but nobody says which.*eagle_aux_hidden"], [[1], r"2 layers, but \[1\] are"]):
        with pytest.raises(UserError, match=f"(?s){said}"):
            EngineFiles.of(str(tmp_path), layers).sites(["model.layers.0"])
    assert EngineFiles.of(str(tmp_path), [1, 4]).sites(["model.layers.*"]) == [
        Site("model.layers.0", WIDTH), Site("model.layers.3", WIDTH),
    ]  # fmt: skip
    (tmp_path / "engine.json").write_text('{"engine": "vllm", "layers": [1, 2]}')
    with pytest.raises(UserError, match=r"engine.json lists the layers"):
        Engine.of(tmp_path, [1, 4])


@pytest.mark.parametrize("text", ["[]", "{", '{"layers": "x"}', '{"layers": 7}', "[" * 5000])
def test_an_engine_json_of_nonsense_is_refused(tmp_path, text):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(UserError, match=r"engine.json cannot be read"):
        Engine.of(tmp_path, [])


def test_a_file_of_another_width_or_without_a_layer_is_named(tmp_path):
    write(tmp_path / "a.safetensors")
    write_named(tmp_path / "b.safetensors", torch.arange(3), model__layers__0=torch.zeros(3, WIDTH + 1))
    files = EngineFiles.of(str(tmp_path), [1, 2])
    sites = files.sites(["model.layers.0"])
    with pytest.raises(UserError, match=r"b.safetensors holds model.layers.0 of width 5, but other files have 4"):
        files.require_like(["a", "b"], sites)
    with pytest.raises(UserError, match=r"b.safetensors holds model.layers.1 only the output of layer 0"):
        files.require_like(["b"], files.sites(["model.layers.1"]))


def test_vectors_and_ids_of_different_lengths_are_refused(tmp_path):
    write_named(tmp_path / "a.safetensors", torch.arange(4), model__layers__0=torch.zeros(3, WIDTH))
    with pytest.raises(UserError, match=r"vectors of 3 tokens .*the file has 4 token ids"):
        EngineFiles.of(str(tmp_path), []).sites(["model.layers.0"])


@pytest.mark.parametrize("wrong", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_named_by_file_and_token(tmp_path, wrong):
    states = torch.zeros(1, 5, WIDTH)
    states[0, 3, 2] = float(wrong)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    ids = torch.arange(5)[None]
    write_named(tmp_path / "a.safetensors", ids, attention_mask=mask, model__layers__0=states)
    files = EngineFiles.of(str(tmp_path), [])
    with pytest.raises(UserError, match=f"a.safetensors: model.layers.0 is {wrong} at token 2, neuron 2"):
        files.read("a", 1, np.arange(2, 5), files.sites(["model.layers.0"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_vectors_are_read_as_they_were_written_a_piece_at_a_time(tmp_path, dtype):
    states = torch.randn(7, 3, WIDTH).to(getattr(torch, dtype))
    save_file({"token_ids": torch.arange(7), "hidden_states": states}, tmp_path / "a.safetensors")
    files = EngineFiles.of(str(tmp_path), [0, 2, 9])
    sites = files.sites(["model.layers.1", "model.layers.9:input"])
    for site, values in zip([1, 2], files.read("a", 2, np.arange(2, 5), sites), strict=True):
        torch.testing.assert_close(values, states[2:5, site].float(), rtol=0, atol=0)


def test_the_engine_is_the_one_that_the_folder_or_the_tensors_name(tmp_path):
    def engine_of(name: str) -> tuple[str, str | None]:
        return EngineFiles.of(str(tmp_path / name), [1, 2]).first[1]

    write(tmp_path / "vllm" / "a.safetensors")
    ids, states = torch.arange(3), torch.zeros(3, WIDTH)
    write_named(tmp_path / "lens" / "a.safetensors", ids, blocks__0__hook_resid_post=states)
    write_named(tmp_path / "said" / "a.safetensors", ids, {"engine": "nnsight", "engine_version": "0.5"}, a=states)
    write_named(tmp_path / "modules" / "a.safetensors", ids, a=states)
    assert engine_of("vllm") == ("vllm", None)
    assert engine_of("lens") == ("transformer_lens", None)
    assert engine_of("said") == ("nnsight", "0.5")
    assert engine_of("modules") == ("modules", None)


def test_the_state_of_a_folder_changes_with_its_requests(tmp_path):
    write(tmp_path / "a.safetensors")
    before = RequestFolder.of(str(tmp_path)).states()
    assert before == RequestFolder.of(str(tmp_path)).states()
    write(tmp_path / "b.safetensors")
    assert before != RequestFolder.of(str(tmp_path)).states()
