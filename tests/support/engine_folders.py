"""Folders as inference engines write them, made with a small real model: the same hidden states in each layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeflow.model.load import load_model
from saeflow.model.sites import SiteReader, resolve_sites
from saeflow.recipe.data_settings import ModelConfig
from tests.support.small_pipeline import documents

LAYERS = ["transformer.h.0", "transformer.h.1"]
"""The model's layers: their outputs are vLLM's layers 1 and 2."""


@dataclass(frozen=True)
class Answered:
    """What an engine has read, and the activations (n, D) at each site."""

    ids: list[int]
    states: dict[str, Tensor]


def answered(model: Path, ids: Mapping[str, Sequence[int]], sites: Sequence[str]) -> dict[str, Answered]:
    """Run the model over requests, one at a time."""
    loaded = load_model(ModelConfig(path=str(model)))
    reader = SiteReader(loaded, resolve_sites(loaded, list(sites)))
    found = {}
    for key, each in ids.items():
        read = reader.read(torch.tensor([list(each)]), None) if each else {}
        states = {site: read[site][0].clone() if each else torch.zeros(0, 16) for site in sites}
        found[key] = Answered(list(each), states)
    reader.close()
    return found


def write_vllm(
    folder: Path, requests: Mapping[str, Answered], sites: Sequence[str] = LAYERS, about: bool = True
) -> Path:
    """One file a request: token_ids [n] and hidden_states [n, layers, D], as vLLM's example connector saves."""
    for name, each in requests.items():
        states = torch.stack([each.states[site] for site in sites], dim=1)
        _save(folder / f"{name}.safetensors", {"hidden_states": states, "token_ids": torch.tensor(each.ids)})
    if about:
        layers = [int(site.rpartition(".")[2]) + 1 for site in sites]
        text = json.dumps({"engine": "vllm", "version": "0.20.2", "layers": layers})
        (folder / "engine.json").write_text(text)
    return folder


def write_transformer_lens(folder: Path, requests: Mapping[str, Answered]) -> Path:
    """One file a request: tokens [1, n] and the hooks of its ActivationCache [1, n, D], some of them no vectors."""
    for name, each in requests.items():
        n = len(each.ids)
        hooks = {f"blocks.{i}.hook_resid_post": each.states[site][None] for i, site in enumerate(LAYERS)}
        hooks |= {"blocks.0.attn.hook_pattern": torch.zeros(1, 2, n, n), "blocks.0.attn.hook_q": torch.ones(1, n, 2, 8)}
        _save(folder / f"{name}.safetensors", {"tokens": torch.tensor([each.ids]), **hooks})
    return folder


def write_batches(folder: Path, requests: Mapping[str, Answered], at_once: int = 3) -> Path:
    """Several requests a file, padded on the left as nnsight pads them, with an index that names the rows."""
    names, index, about = sorted(requests), [], {row["key"]: row for row in documents()}
    for number, start in enumerate(range(0, len(names), at_once)):
        chosen = [requests[name] for name in names[start : start + at_once]]
        length = max(len(each.ids) for each in chosen)
        shape = len(chosen), length
        ids, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
        states = {f"{site}.output": torch.full((*shape, 16), torch.nan) for site in LAYERS}
        for row, each in enumerate(chosen):
            real = slice(length - len(each.ids), length)
            ids[row, real], mask[row, real] = torch.tensor(each.ids, dtype=torch.int32), True
            for site in LAYERS:
                states[f"{site}.output"][row, real] = each.states[site]
        _save(folder / f"batch{number}.safetensors", {"input_ids": ids, "attention_mask": mask, **states})
        rows = [f"batch{number}-{row}" if len(chosen) > 1 else f"batch{number}" for row in range(len(chosen))]
        index += [
            {"request_id": row, **about.get(name, {"key": name})}
            for row, name in zip(rows, names[start:], strict=False)
        ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in index))
    return folder


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
