"""The direct path: how a direction reaches the logits through the residual stream and no later layer.

See "interpreting GPT: the logit lens" (nostalgebraist 2020), and direct logit attribution in Elhage et al. 2021, "A
mathematical framework for transformer circuits". A small pass through the model finds the path, whatever the
architecture: sums are followed back in the graph of that pass, modules by the tensors that they take.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saeflow.model.sites import device_of
from saeflow.runtime.linear import linear

LinearMap = Callable[[Tensor], Tensor]
"""A linear map from directions (n, width) in float32 to directions (n, another width)."""


@dataclass(frozen=True)
class DirectPath:
    """The way from directions at a site to logits: the maps in turn, then the unembedding (V, d)."""

    maps: Sequence[LinearMap]
    unembedding: Tensor

    def apply(self, directions: Tensor) -> Tensor:
        for each in self.maps:
            directions = each(directions)
        return directions


def direct_path(model: nn.Module, site: str) -> DirectPath | None:
    """Return the path from a site to the logits; None if the model has no logits, or if no path is linear."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    unembedding = getattr(head, "weight", None)
    if not isinstance(unembedding, Tensor) or unembedding.dim() != 2:
        return None
    recorded = _RecordedPass.through(model)
    there, end = recorded.at(model, site), recorded.taken.get(head)
    if there is None or end is None or end.width != unembedding.shape[1]:
        return None
    last: list[LinearMap] = []
    while (first := recorded.way(there, recorded.summands(end))) is None:
        step = recorded.giver(end)
        if step is None:
            return None
        end, last = step[0], [step[1], *last]
    return DirectPath([*first, *last], unembedding.detach())


@dataclass(frozen=True)
class _PassTensor:
    """A tensor as it was at some moment of the pass. It is kept, so that no other tensor gets its memory."""

    tensor: Tensor
    version: int
    node: Any

    @classmethod
    def of(cls, value: Any) -> _PassTensor | None:
        first = value[0] if isinstance(value, tuple) and value else value
        is_vector = isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2
        return cls(first, first._version, first.grad_fn) if is_vector else None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for a view of the whole tensor, different once the tensor was changed in place."""
        return self.tensor.data_ptr(), self.tensor.shape, self.version

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]


@dataclass
class _RecordedPass:
    """The tensors that modules took and gave in a pass over two tokens."""

    taken: dict[nn.Module, _PassTensor] = field(default_factory=dict)
    given: dict[nn.Module, _PassTensor] = field(default_factory=dict)
    takers: dict[object, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    givers: dict[object, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    """Modules by the tensor, in the order they ran."""

    @classmethod
    def through(cls, model: nn.Module) -> _RecordedPass:
        recorded = cls()
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for module in model.modules():
                if isinstance(module, nn.Embedding):  # a graph begins here, though no weight is trained
                    hooks.callback(module.register_forward_hook(_start_graph).remove)
                hooks.callback(module.register_forward_pre_hook(recorded._take).remove)
                hooks.callback(module.register_forward_hook(recorded._give).remove)
            model(torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)))
        return recorded

    def _take(self, module: nn.Module, inputs: Any) -> None:
        self._note(_PassTensor.of(inputs), module, self.taken, self.takers)

    def _give(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._note(_PassTensor.of(output), module, self.given, self.givers)

    @staticmethod
    def _note(
        found: _PassTensor | None, module: nn.Module, first: dict[nn.Module, _PassTensor],
        by_tensor: dict[object, list[nn.Module]],
    ) -> None:  # fmt: skip
        if found is not None and module not in first:
            first[module] = found
            by_tensor[found.key].append(module)

    def at(self, model: nn.Module, site: str) -> _PassTensor | None:
        name, _, side = site.partition(":")
        module = dict(model.named_modules()).get(name)  # None: a record may name what the model has not
        return (self.taken if side == "input" else self.given).get(module) if module is not None else None

    def giver(self, end: _PassTensor) -> tuple[_PassTensor, LinearMap] | None:
        """Return what the linear module or norm that gave this tensor took, and how it acts on directions."""
        for module in self.givers[end.key]:
            taken = self.taken.get(module)
            if taken is not None and taken.key != end.key and (acts := _linear_map(module, taken.width)) is not None:
                return taken, acts
        return None

    def summands(self, end: _PassTensor) -> set[Any]:
        """Return the nodes of the graph whose tensors add up to this one, itself included: the residual stream."""
        found, ahead = set(), [end.node, *(self.given[module].node for module in self.givers[end.key])]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in found:
                found.add(node)
                ahead += [before for before, _ in node.next_functions] if _only_adds(node) else []
        return found

    def way(self, there: _PassTensor, stream: set[Any]) -> list[LinearMap] | None:
        """Return the maps from this tensor into the stream: none, or those of linear modules and norms."""
        if there.node in stream:
            return []
        for module in self.takers[there.key]:
            given = self.given.get(module)
            if given is not None and given.key != there.key and (acts := _linear_map(module, there.width)) is not None:
                rest = self.way(given, stream)
                if rest is not None:
                    return [acts, *rest]
        return None


def _start_graph(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()


def _only_adds(node: Any) -> bool:
    """True if this node of the graph gives the sum of what it takes, or the same numbers in another shape or dtype."""
    kept = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0", "CloneBackward0")
    return node.name() in kept or (node.name() == "AddBackward0" and node._saved_alpha == 1)


def _linear_map(module: nn.Module, width: int) -> LinearMap | None:
    """Return how a linear module or norm of this width acts on directions, without biases and a norm's divisor."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        weight: Tensor = module.weight.detach().float().cpu()
        return partial(linear, weights=weight if isinstance(module, nn.Linear) else weight.t().contiguous())
    return _norm_map(module, width)


def _norm_map(module: nn.Module, width: int) -> LinearMap | None:
    """Return how a norm acts, found by trial: some centre, some scale by 1 + weight. None if it is no norm."""
    if next(module.children(), None) is not None or any(weight.dim() > 1 for weight in module.parameters()):
        return None

    def odd(x: Tensor) -> Tensor:
        alone = copy.deepcopy(module).float().cpu()
        given: Tensor = (alone(x[None, None]) - alone(-x[None, None])) / 2
        return given.reshape(width)

    x = 1.0 - 2.0 * (torch.arange(width) % 2)
    x = _with_unit_square(x - x.mean())
    y = 1 + torch.randn(width, generator=torch.Generator().manual_seed(0))
    try:
        scale, given, doubled = odd(1024 * x) / x, odd(y), odd(2 * y)  # a norm's epsilon is nothing beside 1024
    except Exception:  # the module takes other inputs, and raises some error of its own
        return None
    for centre in (0.0, 1.0):
        predicted = scale * _with_unit_square(y - centre * y.mean())
        if max((predicted - given).abs().max(), (predicted - doubled).abs().max()) <= 1e-3 * predicted.abs().max():
            return lambda directions: (directions - centre * directions.mean(1, keepdim=True)) * scale
    return None


def _with_unit_square(x: Tensor) -> Tensor:
    """Return x scaled to a mean square of one."""
    return x / x.square().mean().sqrt()
