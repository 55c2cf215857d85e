"""What follows from an autoencoder's directions alone, and from the model: features alike, and the words they push.

The *direct path* is what reaches the logits through the residual stream and no later layer: the direction, the final
norm's scale, the unembedding ("interpreting GPT: the logit lens", nostalgebraist 2020; direct logit attribution,
Elhage et al. 2021, "A mathematical framework for transformer circuits"). It is found in a small pass through the
model, whatever the architecture: sums are followed back in the graph of that pass, modules by the tensors they take.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from saeflow.encoding import linear
from saeflow.feature_tables import RUN_TABLES, TOP, TOP_LOGITS
from saeflow.kernels import in_parallel, ranges
from saeflow.model import device_of

_ROWS, _COLUMNS = 256, 16384
"""Products held by a worker at once: 16 MiB."""

Directions = Tensor | np.ndarray
Map = Callable[[Tensor], Tensor]
"""Of directions (n, width) in float32 to others (n, another width); linear."""


def similar(directions: Directions, top: int = TOP) -> pa.Table:
    """For each feature the `top` others whose directions (F, D) have the largest cosine with its own.

    Ordered by feature, then cosine, largest first, then the other feature. Directions without length have no rows.
    Memory is a copy of the directions and a few blocks.
    """
    rows, ids = _with_length(directions)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64, keepdim=True).float()
    ((cosines, others),) = _largest_products(unit, unit, min(top, max(len(unit) - 1, 0)), among_themselves=True)
    return _table("similar", ids, ids[others.numpy()], cosines)


@torch.no_grad()
def logits(directions: Directions, model: nn.Module, site: str, top: int = TOP_LOGITS) -> pa.Table | None:
    """For each feature the vocabulary entries that its direction at `site` pushes up most, `top` of them, and down most.

    None where the model has no logits, or no direct path leads there from the site. Logits are those of a direction as
    it is, less their mean over the vocabulary; ordered by feature, then logit, largest first, then entry. Left out are
    later layers, biases, and what the norms divide by at a token: true logits are these times a positive number, which
    differs from token to token but not among the entries. Directions without length have no rows.
    Memory is a copy of the directions (two, where a module lies between site and stream) and a few blocks.
    """
    path = direct_path(model, site)
    if path is None:
        return None
    rows, ids = _with_length(directions)
    parts = in_parallel(lambda part: path.apply(rows[slice(*part)]), _blocks(rows))
    stream = torch.cat([torch.zeros(0, path.unembedding.shape[1]), *parts])
    n = min(top, len(path.unembedding) // 2)
    mean = stream @ path.unembedding.mean(0, dtype=torch.float32).cpu()
    (up, up_ids), (down, down_ids) = _largest_products(stream, path.unembedding, n, signs=(1, -1))
    values, entries = _in_order(torch.cat([up, -down], 1) - mean[:, None], torch.cat([up_ids, down_ids], 1))
    return _table("logits", ids, entries.numpy(), values)


def _with_length(directions: Directions) -> tuple[Tensor, np.ndarray]:
    """Those that have a length, in float32, and their ids."""
    if isinstance(directions, np.ndarray):
        directions = torch.from_numpy(np.require(directions, requirements="W"))  # torch warns of those it may not write
    rows = directions.detach().float().cpu()
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    alive = lengths.isfinite() & (lengths > 0)
    ids = alive.nonzero().flatten().int().numpy()
    return rows if alive.all() else rows[alive], ids


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    return ranges(len(rows), _ROWS)


def _table(name: str, ids: np.ndarray, others: np.ndarray, values: Tensor) -> pa.Table:
    owners = np.repeat(ids, others.shape[1])
    return pa.table([owners, others.ravel().astype(np.int32), values.numpy().ravel()], schema=RUN_TABLES[name])


def _largest_products(
    rows: Tensor, others: Tensor, k: int, signs: Sequence[int] = (1,), among_themselves: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """For each sign the k largest of sign × rows (n, d) @ others (m, d).T in each row, largest first, and their columns
    (n, k); among equals, the lower column. Of rows `among_themselves` none is compared with itself, and products are
    cosines."""
    best = [(torch.full((len(rows), k), -torch.inf), torch.zeros(len(rows), k, dtype=torch.int64)) for _ in signs]
    for start, stop in ranges(len(others), _COLUMNS):
        columns = others[start:stop].float().cpu()

        def work(part: tuple[int, int], columns: Tensor = columns, start: int = start) -> None:
            block = slice(*part)
            products = linear(rows[block], columns)
            if among_themselves:
                products.clamp_(-1, 1).diagonal(part[0] - start).fill_(-torch.inf)
            for sign, (values, ids) in zip(signs, best, strict=True):
                found, places = _largest(products if sign > 0 else products.neg_(), k)
                both = torch.cat([values[block], found], 1), torch.cat([ids[block], places + start], 1)
                order = both[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
                values[block], ids[block] = (each.gather(1, order) for each in both)

        in_parallel(work, _blocks(rows))
    return best


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each row's k largest, or all of fewer, largest first, and their columns; among equals, the lower column."""
    k = min(k, values.shape[1])
    found, ids = values.topk(min(k + 1, values.shape[1]), dim=1)
    if k < found.shape[1]:
        tied = (found[:, k - 1] == found[:, k]).nonzero().flatten() if k else ids.new_empty(0)
        found, ids = found[:, :k].contiguous(), ids[:, :k].contiguous()
        ids[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _in_order(values.gather(1, ids), ids)


def _in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's values, largest first, with their ids; equal ones by id."""
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


@dataclass(frozen=True)
class DirectPath:
    """From directions at a site to logits: the maps in turn, then the unembedding (V, d)."""

    maps: Sequence[Map]
    unembedding: Tensor

    def apply(self, directions: Tensor) -> Tensor:
        for each in self.maps:
            directions = each(directions)
        return directions


def direct_path(model: nn.Module, site: str) -> DirectPath | None:
    """None where the model has no logits, or what the site gives takes no linear way to them without another layer."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    unembedding = getattr(head, "weight", None)
    if not isinstance(unembedding, Tensor) or unembedding.dim() != 2:
        return None
    seen = _Pass.through(model)
    there, end = seen.at(model, site), seen.taken.get(head)
    if there is None or end is None or end.width != unembedding.shape[1]:
        return None
    last: list[Map] = []
    while (first := seen.way(there, seen.summands(end))) is None:
        step = seen.giver(end)
        if step is None:
            return None
        end, last = step[0], [step[1], *last]
    return DirectPath([*first, *last], unembedding.detach())


@dataclass(frozen=True)
class _Seen:
    """A tensor at the moment it was seen: kept, so that its memory is not given to another."""

    tensor: Tensor
    version: int
    node: Any

    @classmethod
    def of(cls, value: Any) -> _Seen | None:
        first = value[0] if isinstance(value, tuple) and value else value
        is_vector = isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2
        return cls(first, first._version, first.grad_fn) if is_vector else None

    @property
    def key(self) -> tuple[object, ...]:
        """The same for a view of all of it, another once it was changed in place."""
        return self.tensor.data_ptr(), self.tensor.shape, self.version

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]


@dataclass
class _Pass:
    """What modules took and gave in a pass over two tokens."""

    taken: dict[nn.Module, _Seen] = field(default_factory=dict)
    given: dict[nn.Module, _Seen] = field(default_factory=dict)
    takers: dict[object, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    givers: dict[object, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    """Modules by the tensor, in the order they ran."""

    @classmethod
    def through(cls, model: nn.Module) -> _Pass:
        seen = cls()
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for module in model.modules():
                if isinstance(module, nn.Embedding):  # from here on there is a graph, though no weight is trained
                    hooks.callback(module.register_forward_hook(_start).remove)
                hooks.callback(module.register_forward_pre_hook(seen._take).remove)
                hooks.callback(module.register_forward_hook(seen._give).remove)
            model(torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)))
        return seen

    def _take(self, module: nn.Module, inputs: Any) -> None:
        self._note(_Seen.of(inputs), module, self.taken, self.takers)

    def _give(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._note(_Seen.of(output), module, self.given, self.givers)

    @staticmethod
    def _note(
        found: _Seen | None, module: nn.Module, first: dict[nn.Module, _Seen], by_tensor: dict[object, list[nn.Module]]
    ) -> None:
        if found is not None and module not in first:
            first[module] = found
            by_tensor[found.key].append(module)

    def at(self, model: nn.Module, site: str) -> _Seen | None:
        name, _, side = site.partition(":")
        return (self.taken if side == "input" else self.given).get(model.get_submodule(name))

    def giver(self, end: _Seen) -> tuple[_Seen, Map] | None:
        """The linear module or norm that gave this tensor: what it took, and how it acts on directions."""
        for module in self.givers[end.key]:
            taken = self.taken.get(module)
            if taken is not None and taken.key != end.key and (acts := _action(module, taken.width)) is not None:
                return taken, acts
        return None

    def summands(self, end: _Seen) -> set[Any]:
        """The nodes of the graph whose tensors are added to give this one, itself included: the residual stream."""
        found, ahead = set(), [end.node, *(self.given[module].node for module in self.givers[end.key])]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in found:
                found.add(node)
                ahead += [before for before, _ in node.next_functions] if _only_adds(node) else []
        return found

    def way(self, there: _Seen, stream: set[Any]) -> list[Map] | None:
        """How directions get from this tensor into the stream: as they are, or through linear modules and norms."""
        if there.node in stream:
            return []
        for module in self.takers[there.key]:
            given = self.given.get(module)
            if given is not None and given.key != there.key and (acts := _action(module, there.width)) is not None:
                rest = self.way(given, stream)
                if rest is not None:
                    return [acts, *rest]
        return None


def _start(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()


def _only_adds(node: Any) -> bool:
    """Is what this node of the graph gives the sum of what it takes, or the same in another shape or precision?"""
    kept = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0", "CloneBackward0")
    return node.name() in kept or (node.name() == "AddBackward0" and node._saved_alpha == 1)


def _action(module: nn.Module, width: int) -> Map | None:
    """What a linear module, or a norm, of this width does to directions, less biases and what the norm divides by."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        weight: Tensor = module.weight.detach().float().cpu()
        return partial(linear, weights=weight if isinstance(module, nn.Linear) else weight.t().contiguous())
    return _norm(module, width)


def _norm(module: nn.Module, width: int) -> Map | None:
    """What a norm does, by trial: some centre, some scale by 1 + weight. None for what is no norm."""
    if next(module.children(), None) is not None or any(weight.dim() > 1 for weight in module.parameters()):
        return None
    alone = copy.deepcopy(module).float().cpu()

    def odd(x: Tensor) -> Tensor:
        given: Tensor = (alone(x[None, None]) - alone(-x[None, None])) / 2
        return given.reshape(width)

    x = 1.0 - 2.0 * (torch.arange(width) % 2)
    x = _of_length(x - x.mean())
    y = 1 + torch.randn(width, generator=torch.Generator().manual_seed(0))
    try:
        scale, given, doubled = odd(1024 * x) / x, odd(y), odd(2 * y)  # beside 1024, what a norm adds is nothing
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return None
    if not torch.allclose(given, doubled, rtol=1e-3, atol=1e-3):
        return None
    for centre in (0.0, 1.0):
        if torch.allclose(given, scale * _of_length(y - centre * y.mean()), rtol=1e-3, atol=1e-3):
            return lambda directions: (directions - centre * directions.mean(1, keepdim=True)) * scale
    return None


def _of_length(x: Tensor) -> Tensor:
    """With a mean square of one."""
    return x / x.square().mean().sqrt()
