"""Memory that trainings take on each device, priced before any work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from saeflow.activations.upload import N_SLOTS
from saeflow.model.sites import Site
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.devices import choose_device, device_memory
from saeflow.runtime.errors import UserError
from saeflow.runtime.linear import fast_dtype
from saeflow.runtime.ranks import ALONE, Ranks
from saeflow.runtime.text import human_bytes
from saeflow.sae.gpu.memory import TrainingSize
from saeflow.sae.optimizer.adam import MOMENT_BYTES
from saeflow.sae.split import Split
from saeflow.train import fused


@dataclass(frozen=True)
class _Need:
    """Bytes that one training holds from beginning to end, and those that it takes while it steps."""

    state: int
    step: int
    by_kernels: bool


def require_memory(wanted: Iterable[tuple[Recipe, list[Site]]], ranks: Ranks = ALONE) -> None:
    """Raise UserError if memory cannot hold all trainings, and what the one that steps needs.

    A training holds weights and Adam's two moments. While it steps it has gradients or, by the kernels of a
    GPU, the temporaries of `TrainingSize`. Each rank needs that for its features; on the processor they share the
    memory.
    """
    needs: dict[torch.device, list[_Need]] = {}
    for recipe, sites in wanted:
        place, split = choose_device("train.device", recipe.train.device), Split.of(ranks, recipe.train.parallel)
        by_kernels = fused.takes(recipe.sae, recipe.train, place, split)
        need_of = _of_kernels if by_kernels and recipe.sae.counts_k else _dense  # relu may go on by torch's operations
        need = need_of(recipe, (sites[0].width, sites[-1].width), place, split)
        needs.setdefault(place, []).extend([need] * recipe.train.restarts)
    for place, here in needs.items():
        n_there, total = ranks.n if place.type == "cpu" else 1, device_memory(place)
        whole = n_there * (sum(each.state for each in here) + max(each.step for each in here))
        if whole > total:
            raise UserError(_refusal(place, here, whole, total))


def _dense(recipe: Recipe, widths: tuple[int, int], place: torch.device, split: Split) -> _Need:
    n_weights = -(-recipe.sae.n_features // split.features.n) * (sum(widths) + 2)
    return _Need(round((4 + MOMENT_BYTES[recipe.train.moments]) * n_weights), 4 * n_weights, False)


def _of_kernels(recipe: Recipe, widths: tuple[int, int], place: torch.device, split: Split) -> _Need:
    size = TrainingSize.of(recipe.sae, recipe.train, widths, recipe.feed.batch_rows, split)
    size = replace(size, dtype=fast_dtype(place))
    batch = recipe.feed.batch_rows * sum(widths if recipe.sae.target_site is not None else widths[:1])
    as_stored = N_SLOTS * getattr(torch, recipe.activations.dtype).itemsize
    return _Need(size.state_bytes, size.step_bytes + (4 + as_stored) * batch, True)


def _refusal(place: torch.device, here: list[_Need], need: int, total: int) -> str:
    where = "this machine has" if place.type == "cpu" else f"on {place} are free"
    if not any(each.by_kernels for each in here):
        return (
            f"{len(here)} SAEs in training take {human_bytes(need)} (weights, gradients, moments), but {where} "
            f"{human_bytes(total)} of memory.\n"
            "Train fewer at once: shorten [sweep], or lower train.restarts. Or choose a smaller sae.n_features, or "
            'train.moments = "8bit".'
        )
    state, step = sum(each.state for each in here), max(each.step for each in here)
    which = "An SAE in training takes" if len(here) == 1 else f"{len(here)} SAEs in training take"
    fewer = "" if len(here) == 1 else "shorten [sweep], lower train.restarts, "
    return (
        f"{which} {human_bytes(need)}: {human_bytes(state)} for weights and moments, {human_bytes(step)} in a step. "
        f"But {where} {human_bytes(total)} of memory.\n"
        f'To need less, {fewer}lower feed.batch_rows or sae.n_features, choose train.moments = "8bit", or split the '
        'features over several GPUs: train.parallel = "features", started by torchrun.'
    )
