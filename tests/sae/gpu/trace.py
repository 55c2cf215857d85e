"""What a training step by kernels launches, asks the device for and holds.

On tensors of the device `meta`, which have a size and no data, no kernel runs, so a step of any size takes a second.
Where the host would need a number from the device, torch raises, because there is none. On the processor Triton's
interpreter runs the kernels, and what it does itself is not noted.

python -m tests.sae.gpu.trace     prints the table of `docs/built/gpu-kernels.md`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import KernelInterface

import tests.sae.gpu  # noqa: F401  which chooses the interpreter before Triton is imported
from docs._generate import table
from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.runtime.ranks import Ranks
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.gpu.fused import FusedStep, StepOptions
from saeflow.sae.optimizer.adam import begun_state, optimizer_of
from saeflow.sae.optimizer.bfloat16 import store_narrow
from saeflow.sae.split import Split

META = torch.device("meta")
AUX_WEIGHT = 1 / 32


class Sizes(NamedTuple):
    n_rows: int
    n_features: int
    width: int
    k: int


REAL = (Sizes(8192, 65_536, 2304, 64), Sizes(4096, 131_072, 4096, 64))
"""The two sizes that the kernels are made for."""
SHARE_DEAD = 0.05
ARCHITECTURES = "topk", "batchtopk", "matryoshka"


@dataclass
class Trace(TorchDispatchMode):
    """Operations of torch and launches of kernels inside the block, and the memory that they take."""

    operations: list[str] = field(default_factory=list)
    """Those that make a tensor or change one."""
    transfers: list[str] = field(default_factory=list)
    """Those that take or make a tensor in the processor's memory, if the step is on another device, and those that set
    numbers by a mask, whose size the host waits for. Any other question to a device without data is an error."""
    kernels: list[str] = field(default_factory=list)
    largest: int = 0
    """Most numbers in a tensor that was made."""
    peak: int = 0
    """Most bytes of all tensors that were made and still there."""

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        given, found = _tensors((args, kwargs)), _tensors(out)
        made = [each for each in found if _address(each) not in set(map(_address, given))]
        if made or (func._schema.is_mutable and name not in _SHAPES):
            self.operations.append(name)
        is_mask = name == "index_put_" and any(each.dtype == torch.bool for each in _tensors(args[1]))
        if {each.device.type for each in given + found} == {"cpu", "meta"} or is_mask:
            self.transfers.append(name)
        self._measure(made)
        return out

    def _measure(self, made: list[Tensor]) -> None:
        for each in made:
            storage = each.untyped_storage()
            self._storages[_address(each)] = StorageWeakRef(storage), storage.nbytes()
            self.largest = max(self.largest, storage.nbytes() // each.element_size())
        self._storages = {at: kept for at, kept in self._storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))


_SHAPES = {"squeeze_", "unsqueeze_", "resize_", "t_"}
"""Operations that change no number."""


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor)]


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace the block. On the device `meta`, kernels are noted and do nothing."""
    trace = Trace()

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            trace.kernels.append(kernel.__name__)
            if not any(each.is_meta for each in _tensors((arguments, named))):
                with _disable_current_modes():
                    kernel.run(*arguments, grid=grid, warmup=False, **named)

        return launch

    with patch.object(KernelInterface, "__getitem__", launcher), trace:
        yield trace


class OneOfMany(Ranks):
    """A rank whose exchanges have the right sizes, and reach nobody."""

    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(self.n, *tensor.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    least_ = sum_


Sharing = Literal["rows", "features"]


def a_step(
    sizes: Sizes, dtype: torch.dtype = torch.bfloat16, place: torch.device = META, train: TrainConfig | None = None,
    n_ranks: int = 1, what: Sharing = "rows", **changes: Any,
) -> FusedStep:  # fmt: skip
    """Return a step with fresh weights, before its first batch."""
    train = train or TrainConfig()
    settings = {"architecture": "topk", "n_features": sizes.n_features, "k": sizes.k} | changes
    with place:
        split = Split(**{what: OneOfMany(n_ranks // 2, n_ranks)})
        sae = SparseAutoencoder(SAEConfig.model_validate(settings), sizes.width, split=split)
    adam = optimizer_of(sae, train)
    for each in sae.parameters():
        begun_state(adam, each)["step"] = torch.tensor(0.0)
    if train.weights == "bfloat16":
        store_narrow(sae)
    return FusedStep(sae, adam, dtype, 1e-3, AUX_WEIGHT, 1000)


def trace_of(
    sizes: Sizes, dtype: torch.dtype = torch.bfloat16, place: torch.device = META, share_dead: float = SHARE_DEAD,
    n_ranks: int = 1, what: Sharing = "rows", **changes: Any,
) -> Trace:  # fmt: skip
    """Return the trace of a step that follows another; a share of the features is dead."""
    step = a_step(sizes, dtype, place, n_ranks=n_ranks, what=what, **changes)
    n_dead = int(share_dead * sizes.n_features)
    step.sae.tokens_since_fired[:n_dead] = 10_000
    x = torch.randn(sizes.n_rows, sizes.width, device=place)
    options = StepOptions(1e-3, sizes.k, step.sae.traits.chooses_by_token, n_dead)
    for _ in range(2):
        with traced() as trace:
            step(x, None, options)
    return trace


def launches() -> str:
    """Return the table of `docs/built/gpu-kernels.md`."""
    traces = [trace_of(REAL[0], architecture=name) for name in ARCHITECTURES]
    kernels = list(dict.fromkeys(name for trace in traces for name in trace.kernels))
    rows = [[f"`{name}`", *(str(trace.kernels.count(name)) for trace in traces)] for name in kernels]
    for label, names in _GROUPS.items():
        rows.append([label, *(str(sum(map(trace.operations.count, names))) for trace in traces)])
    rows.append(["copies between host and device", *(str(len(trace.transfers)) for trace in traces)])
    n_products, n_weights = REAL[0].n_rows * REAL[0].n_features, REAL[0].n_features * REAL[0].width
    rows.append(["largest tensor, as a share of B × F", *(f"{trace.largest / n_products:.2f}" for trace in traces)])
    rows.append(["the same of F × D", *(f"{trace.largest / n_weights:.2f}" for trace in traces)])
    rows.append(["MiB of all temporary tensors", *(f"{trace.peak / 2**20:.0f}" for trace in traces)])
    return table(["", *ARCHITECTURES], rows, right=(1, 2, 3))


_GROUPS = {
    "torch: sort and top-k": ("sort", "topk"),
    "torch: running sums": ("cumsum",),
    "torch: places in sorted numbers": ("searchsorted",),
    "torch: products of matrices": ("mm", "addmm"),
}


if __name__ == "__main__":
    print(launches())
