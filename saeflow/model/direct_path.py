"""The direct path: what reaches the logits through the residual stream and no later layer.

That is the direction, the final norm's scale, and the unembedding ("interpreting GPT: the logit lens", nostalgebraist
2020; direct logit attribution, Elhage et al. 2021, "A mathematical framework for transformer circuits"). It is found in
a small pass through the model, whatever the architecture: sums are followed back in the graph of that pass, modules by
the tensors they take.
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

Map = Callable[[Tensor], Tensor]
"""Of directions (n, width) in float32 to others (n, another width); linear."""


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

    def odd(x: Tensor) -> Tensor:
        alone = copy.deepcopy(module).float().cpu()
        given: Tensor = (alone(x[None, None]) - alone(-x[None, None])) / 2
        return given.reshape(width)

    x = 1.0 - 2.0 * (torch.arange(width) % 2)
    x = _of_length(x - x.mean())
    y = 1 + torch.randn(width, generator=torch.Generator().manual_seed(0))
    try:
        scale, given, doubled = odd(1024 * x) / x, odd(y), odd(2 * y)  # beside 1024, what a norm adds is nothing
    except Exception:  # it takes something else, and says so in its own way
        return None
    for centre in (0.0, 1.0):
        said = scale * _of_length(y - centre * y.mean())
        if max((said - given).abs().max(), (said - doubled).abs().max()) <= 1e-3 * said.abs().max():
            return lambda directions: (directions - centre * directions.mean(1, keepdim=True)) * scale
    return None


def _of_length(x: Tensor) -> Tensor:
    """With a mean square of one."""
    return x / x.square().mean().sqrt()
