"""What an engine's file holds: the vectors of its tokens, by place. Reads names, types and shapes, no vectors.

vLLM             hidden_states [tokens, layers, width] of one request, and the layers' ids in engine.json
named tensors    one tensor a site, [tokens, width] or [batch, tokens, width], as users of nnsight, nnterp and
                 TransformerLens save them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saeflow.activations.engines.places import Place, place_of
from saeflow.corpus.files import shown
from saeflow.corpus.requests.files import IDS, MASK, ids_name
from saeflow.corpus.requests.folder import ENGINE_FILE
from saeflow.runtime.errors import UserError, first_line

_STATES = "hidden_states"
_SIGNS = {"vllm": _STATES, "transformer_lens": ".hook_", "nnterp": "layers_"}
"""What a tensor's name says of the engine that made it, where nobody else says it."""


class Vectors(NamedTuple):
    """The tensor that holds a site's vectors, and which of its layers they are, if it holds several."""

    tensor: str
    layer: int | None
    n_rows: int | None
    n_tokens: int
    width: int


@dataclass(frozen=True)
class Engine:
    """What is known of the program that wrote the files."""

    name: str | None = None
    version: str | None = None
    layers: tuple[int, ...] = ()
    """vLLM's ids of the layers in `hidden_states`."""

    @classmethod
    def of(cls, folder: Path, layers: list[int]) -> Engine:
        """Read engine.json, if there is one. `layers` are those of the recipe. Raises UserError if they differ."""
        path = folder / ENGINE_FILE
        about: Any = {}
        try:
            about = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            written = [int(layer) for layer in about.get("layers", [])]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"corpus.requests: {shown(str(path))} cannot be read: {first_line(error)}.") from error
        if layers and written and layers != written:
            raise UserError(
                f"activations.request_layers is {layers}, but {shown(str(path))} lists the layers {written}.\n"
                "Leave activations.request_layers out."
            )
        name, version = (str(about[key])[:100] if about.get(key) else None for key in ("engine", "version"))
        return cls(name, version, tuple(layers or written))

    def named_by(self, names: list[str], metadata: dict[str, str]) -> tuple[str, str | None]:
        """Return the engine and its version: as engine.json, the file itself, or the names of its tensors say."""
        by_sign = next((engine for engine, sign in _SIGNS.items() if any(sign in name for name in names)), None)
        name = self.name or metadata.get("engine") or by_sign or "modules"
        return name[:100], self.version or (metadata.get("engine_version") or "")[:100] or None


def vectors_in(path: Path, file: Any, layers: tuple[int, ...], model: Sequence[str] = ()) -> dict[Place, Vectors]:
    """Return the vectors of an open file by place. Raises UserError if their tokens are not those of its ids."""
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    ids = shapes[ids_name(path, file)]
    found = _of_vllm(path, shapes[_STATES], layers) if _STATES in shapes else _of_names(shapes, ids, model)
    for place, each in found.items():
        if each.n_tokens != ids[-1]:
            raise UserError(
                f"corpus.requests: {shown(str(path))}: {each.tensor} has vectors of {each.n_tokens} tokens "
                f"({place}), but the file has {ids[-1]} token ids.\nSave both of the same tokens."
            )
    return found


def _of_vllm(path: Path, shape: tuple[int, ...], layers: tuple[int, ...]) -> dict[Place, Vectors]:
    n_layers = {2: 1, 3: shape[1]}.get(len(shape)) if len(shape) in (2, 3) else None
    if n_layers is None:
        raise UserError(
            f"corpus.requests: {shown(str(path))}: {_STATES} has shape {shape}, but it must be [tokens, layers, width]."
        )
    if n_layers != len(layers) or len(set(layers)) != len(layers):
        said = f"{list(layers)} are given" if layers else "nobody says which"
        raise UserError(
            f"corpus.requests: {shown(str(path))} holds {n_layers} layers, but {said}.\nSet "
            "activations.request_layers to the ids that vLLM was given as eagle_aux_hidden_state_layer_ids, or write "
            f'them into {ENGINE_FILE} beside the files: {{"engine": "vllm", "version": "…", "layers": [1, 2]}}.'
        )
    width = shape[-1]
    return {
        layer: Vectors(_STATES, i if len(shape) == 3 else None, None, shape[0], width) for i, layer in enumerate(layers)
    }


def _of_names(shapes: dict[str, tuple[int, ...]], ids: tuple[int, ...], model: Sequence[str]) -> dict[Place, Vectors]:
    """Take the tensors that give one vector a token; others, such as patterns of attention, are passed over."""
    found: dict[Place, Vectors] = {}
    for name, shape in shapes.items():
        is_batch = len(shape) == 3 and shape[0] == (ids[0] if len(ids) == 2 else 1)
        if name in (*IDS, MASK) or not (is_batch or (len(shape) == 2 and len(ids) == 1)):
            continue
        found[place_of(name, model)] = Vectors(name, None, shape[0] if is_batch else None, shape[-2], shape[-1])
    return found
