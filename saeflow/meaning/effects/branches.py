"""Many changed copies of a sequence in one forward pass of a language model.

A change at one position leaves everything before it as it is. So one pass reads the sequence once, and behind it a
short *branch* for each change: copies of the changed token and of the few tokens after it. A mask lets a branch see the
sequence before it and itself, nothing else. Speculative decoding verifies trees of tokens in the same way (Miao et al.
2023, SpecInfer, arXiv 2305.09781).

Models differ in what they let a caller mask. `choose_pass` tries it: a model that does not obey the mask is given whole
copies of the sequence instead, which any causal model reads rightly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saeflow.model.sites import device_of, embedding_size, run_on, spliced
from saeflow.runtime.devices import to_device
from saeflow.runtime.errors import UserError

MOST_LOGIT_BYTES = 128 << 20
"""Logits of one pass."""
_MOST_PASS_TOKENS = 8192
"""Tokens of one pass, padding included."""
_CLOSE = {torch.float32: 2e-4, torch.float64: 2e-5}
_CLOSE_HALF = 0.1
"""How far logits of the two kinds of pass may lie apart in a trial, in units of their standard deviation."""


@dataclass(frozen=True)
class Branches:
    """Changes of one sequence. Branch i changes `places[i]` and is read at `lengths[i]` positions from there on."""

    vocab_ids: np.ndarray
    """(T): the sequence; no padding before the last position that is read."""
    places: np.ndarray
    lengths: np.ndarray
    """At least 1."""
    moves: Tensor
    """(n, D) float32: what is added to the vector at the site, for a unit of value of length 1."""

    @property
    def ends(self) -> np.ndarray:
        return np.asarray(self.places + self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """Positions that are read, branch after branch."""
        return np.concatenate([np.arange(a, b) for a, b in zip(self.places, self.ends, strict=True)] or [np.arange(0)])

    def some(self, chosen: slice) -> Branches:
        return Branches(self.vocab_ids, self.places[chosen], self.lengths[chosen], self.moves[chosen])


UnitLengths = Callable[[Tensor], Tensor | float]
"""Gives the length of a unit of value at vectors (n, D)."""


class BranchPass:
    """Runs branches through a model. Several threads may share one. Close it, or the model stays hooked."""

    def __init__(self, model: nn.Module, read: str, target: str, unit_lengths: UnitLengths = lambda x: 1.0) -> None:
        self.model, self.unit_lengths = model, unit_lengths
        self._here = threading.local()
        self._open = contextlib.ExitStack()
        self._open.enter_context(spliced(model, read, target, self._change))
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._open.callback(head.register_forward_pre_hook(self._keep_rows).remove)
        self.n_entries = int(head.weight.shape[0])

    def close(self) -> None:
        self._open.close()

    def _change(self, x: Tensor, there: Tensor) -> Tensor:
        state = getattr(self._here, "state", None)
        if state is None:
            return there
        rows, places, moves = state
        changed = there.clone()
        wide = torch.promote_types(there.dtype, torch.float32)
        move = moves.to(there.device) * self.unit_lengths(x[rows, places])
        changed[rows, places] = (there[rows, places].to(wide) + move).to(there.dtype)
        return changed

    def _keep_rows(self, module: nn.Module, inputs: Any) -> Any:
        """Let the model work out the logits of the rows that are read, and of no others."""
        kept = getattr(self._here, "kept", None)
        if kept is None:
            return None
        return (inputs[0].flatten(0, -2)[kept][None], *inputs[1:])

    @torch.no_grad()
    def logits(self, batch: Sequence[Branches]) -> tuple[Tensor, Tensor]:
        """Return logits (n, V) before and after: a row for each position that is read, branch after branch.

        All sequences of a batch go through the model together.
        """
        raise NotImplementedError

    def n_tokens(self, branches: Branches) -> int:
        """Return how many tokens one sequence takes in a pass."""
        raise NotImplementedError

    def _run(self, ids: Tensor, changed: tuple[Tensor, Tensor, Tensor], kept: Tensor, **options: Any) -> Tensor:
        place = device_of(self.model)
        self._here.state = (changed[0].to(place), changed[1].to(place), changed[2])
        self._here.kept = kept.to(place)
        try:
            found = self.model(to_device(ids, place), **options) if options else run_on(self.model, ids, None)
            logits: Tensor = found.logits
            return logits.reshape(-1, logits.shape[-1])
        finally:
            self._here.state = self._here.kept = None

    def cut(self, branches: Branches) -> Iterator[Branches]:
        """Yield the branches of one sequence in pieces that fit into a pass each."""
        most_rows = min(max(len(branches.vocab_ids), 64), max(1, MOST_LOGIT_BYTES // (8 * self.n_entries)))
        start, total = 0, 0
        for i, length in enumerate(branches.lengths.tolist()):
            if i > start and total + length > most_rows:
                yield branches.some(slice(start, i))
                start, total = i, 0
            total += length
        if start < len(branches.lengths):
            yield branches.some(slice(start, len(branches.lengths)))

    def batches(self, every: Iterable[Branches]) -> Iterator[list[Branches]]:
        """Yield the pieces of all sequences, in order, as many together as fit into one pass."""
        batch: list[Branches] = []
        longest = n_rows = 0
        for piece in (piece for branches in every for piece in self.cut(branches)):
            n_tokens, rows = self.n_tokens(piece), int(piece.lengths.sum())
            too_many = (len(batch) + 1) * max(longest, n_tokens) > _MOST_PASS_TOKENS
            if batch and (too_many or (n_rows + rows) * 8 * self.n_entries > MOST_LOGIT_BYTES):
                yield batch
                batch, longest, n_rows = [], 0, 0
            batch.append(piece)
            longest, n_rows = max(longest, n_tokens), n_rows + rows
        if batch:
            yield batch


class SharedPass(BranchPass):
    """Each sequence once, and its branches behind it under a mask."""

    def n_tokens(self, branches: Branches) -> int:
        return int(branches.ends.max() + branches.lengths.sum())

    def logits(self, batch: Sequence[Branches]) -> tuple[Tensor, Tensor]:
        base = max(int(each.ends.max()) for each in batch)
        tail = max(int(each.lengths.sum()) for each in batch)
        ids = np.zeros((len(batch), base + tail), np.int64)
        positions = np.zeros_like(ids)
        positions[:, :base] = np.arange(base)
        owner = np.full((len(batch), tail), -1)
        begins = np.zeros((len(batch), tail), np.int64)
        changed: list[tuple[int, int]] = []
        before, after = [], []
        for row, each in enumerate(batch):
            known = each.vocab_ids[:base]
            ids[row, : len(known)] = known
            n, at = int(each.lengths.sum()), each.positions
            ids[row, base : base + n], positions[row, base : base + n] = each.vocab_ids[at], at
            owner[row, :n] = np.repeat(np.arange(len(each.places)), each.lengths)
            begins[row, :n] = np.repeat(each.places, each.lengths)
            changed += [(row, base + int(start)) for start in np.cumsum(each.lengths) - each.lengths]
            before.append(row * (base + tail) + at)
            after.append(row * (base + tail) + base + np.arange(n))
        wanted, inverse = np.unique(np.concatenate(before), return_inverse=True)
        kept = torch.from_numpy(np.concatenate([wanted, *after]))
        rows, places = (torch.tensor(each) for each in zip(*changed, strict=True))
        place, dtype = device_of(self.model), next(self.model.parameters()).dtype
        found = self._run(
            torch.from_numpy(ids), (rows, places, torch.cat([each.moves for each in batch])), kept,
            attention_mask=_mask(base, owner, begins, dtype, place),
            position_ids=to_device(torch.from_numpy(positions), place), use_cache=False,
        )  # fmt: skip
        return found[: len(wanted)][torch.from_numpy(inverse).to(found.device)], found[len(wanted) :]


def _mask(base: int, owner: np.ndarray, begins: np.ndarray, dtype: torch.dtype, place: torch.device) -> Tensor:
    """Return the additive mask (s, 1, L, L): 0 where a token sees another, the least number of the type elsewhere."""
    n, tail = owner.shape
    seen = torch.zeros(n, base + tail, base + tail, dtype=torch.bool, device=place)
    seen[:, :base, :base] = torch.ones(base, base, dtype=torch.bool, device=place).tril()
    owners, starts = (to_device(torch.from_numpy(each), place) for each in (owner, begins))
    seen[:, base:, :base] = torch.arange(base, device=place) < starts[:, :, None]
    own = owners[:, :, None] == owners[:, None, :]
    seen[:, base:, base:] = own & torch.ones(tail, tail, dtype=torch.bool, device=place).tril()
    least = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=place).masked_fill_(~seen, least)[:, None]


class CopiedPass(BranchPass):
    """A copy of the sequence for each branch, and one unchanged: right for any causal model, but slower."""

    def n_tokens(self, branches: Branches) -> int:
        return int((len(branches.places) + 1) * branches.ends.max())

    def cut(self, branches: Branches) -> Iterator[Branches]:
        length = int(branches.ends.max()) if len(branches.ends) else 1
        at_once = max(1, _MOST_PASS_TOKENS // length - 1)
        for piece in super().cut(branches):
            for start in range(0, len(piece.places), at_once):
                yield piece.some(slice(start, start + at_once))

    def logits(self, batch: Sequence[Branches]) -> tuple[Tensor, Tensor]:
        found = [self._of_one(each) for each in batch]
        before, after = (torch.cat(each) for each in zip(*found, strict=True))
        return before, after

    def _of_one(self, branches: Branches) -> tuple[Tensor, Tensor]:
        end, n = int(branches.ends.max()), len(branches.places)
        ids = torch.from_numpy(branches.vocab_ids[:end].astype(np.int64)).expand(n + 1, end)
        at, copies = branches.positions, np.repeat(np.arange(1, n + 1), branches.lengths)
        changed = torch.arange(1, n + 1), torch.from_numpy(branches.places.astype(np.int64)), branches.moves
        wanted, inverse = np.unique(at, return_inverse=True)
        kept = torch.from_numpy(np.concatenate([wanted, copies * end + at]))
        found = self._run(ids.contiguous(), changed, kept)
        return found[: len(wanted)][torch.from_numpy(inverse).to(found.device)], found[len(wanted) :]


@dataclass(frozen=True)
class ChosenPass:
    """The kind of pass that is right for a model, and what a trial of it showed."""

    kind: type[BranchPass]
    reaches_later: bool
    """True if a change at a token can move the logits of later tokens."""


@torch.no_grad()
def choose_pass(model: nn.Module, read: str, target: str, width: int, length: int) -> ChosenPass:
    """Try both kinds of pass on a random sequence of this length, and return the shared one if it gives equal logits.

    `width` is that of the target. The changes of the trial are as long as usual vectors there.
    """
    dice = np.random.default_rng(0)
    ids = dice.integers(0, embedding_size(model) or 2, length)
    places = np.unique([0, length // 3, max(length - 3, 0)])
    lengths = np.minimum(2, length - places)
    moves = torch.from_numpy(dice.normal(size=(len(places), width)).astype(np.float32))
    trial = Branches(ids, places, lengths, moves * _usual_length(model, target, ids) / width**0.5)
    with contextlib.closing(CopiedPass(model, read, target)) as copied:
        before, after = copied.logits([trial])
    plain = run_on(model, torch.from_numpy(ids)[None].long(), None).logits[0, torch.from_numpy(trial.positions)]
    if plain.shape != before.shape or not _are_close(plain, before):
        raise UserError(
            f"A {type(model).__name__} does more with its last vectors than give logits, so effects cannot be read.\n"
            "Name a run of a model whose output embeddings alone give the logits, such as GPT-2 or Llama."
        )
    later = torch.from_numpy((np.arange(len(before)) > 0) & (np.diff(trial.positions, prepend=-9) == 1))
    spread = float(before.float().std()) or 1.0
    moved = (after - before).float().abs().amax(1).cpu()[later]
    reaches = bool((moved > 1e-5 * spread).any())
    return ChosenPass(SharedPass if _agrees(model, read, target, trial, before, after) else CopiedPass, reaches)


def _agrees(model: nn.Module, read: str, target: str, trial: Branches, before: Tensor, after: Tensor) -> bool:
    try:
        with contextlib.closing(SharedPass(model, read, target)) as shared:
            found = shared.logits([trial])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes no such mask or positions raises any error of its own
        return False
    return all(
        one.shape == other.shape and _are_close(one, other) for one, other in zip(found, (before, after), strict=True)
    )


def _are_close(one: Tensor, other: Tensor) -> bool:
    spread = float(other.float().std()) or 1.0
    return float((one - other).float().abs().max()) <= _CLOSE.get(other.dtype, _CLOSE_HALF) * spread


def _usual_length(model: nn.Module, target: str, ids: np.ndarray) -> float:
    """Return the median length of vectors at the target."""
    lengths: list[Tensor] = []

    def note(x: Tensor, there: Tensor) -> Tensor:
        lengths.append(torch.linalg.vector_norm(there.float(), dim=-1).flatten())
        return there

    with spliced(model, target, target, note):
        run_on(model, torch.from_numpy(ids)[None].long(), None)
    return float(torch.cat(lengths).median()) or 1.0
