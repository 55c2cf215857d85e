"""Token parts through the model, a batch at a time: what storing activations and encoding without storing share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from saeflow.activations.engines.reader import EngineFiles, RequestRows
from saeflow.activations.lengths import first_tokens, lengths_of, median_of, without_long
from saeflow.activations.writer import to_precision
from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site, SiteReader, device_of, embedding_size
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.devices import own_stream
from saeflow.runtime.errors import UserError
from saeflow.runtime.threads import map_in_order, ranges, use_one_thread
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

Found = TypeVar("Found")

Reading = Callable[[slice], dict[str, Tensor]]
"""Returns the activations (s, T, D) of some sequences of a part, by site."""


def device_of_source(source: nn.Module | EngineFiles) -> torch.device:
    """Return the device of a model; files are read by the processor."""
    return torch.device("cpu") if isinstance(source, EngineFiles) else device_of(source)


@dataclass
class ForwardPass:
    """Runs a model over token parts of `source`, or reads what an inference engine wrote. Threads may share one.

    A batch holds the same sequences whatever is asked for, so each activation always comes out the same.
    """

    source: Artefact
    config: ActivationsConfig
    model: nn.Module | EngineFiles
    sites: list[Site]
    workers: int
    """Forward passes at the same time, over all parts that are at work."""

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, "saeflow-model", initializer=use_one_thread)

    def run(
        self, part: PartRecord, work: Callable[[slice, np.ndarray, list[Tensor]], Found],
        wanted: np.ndarray | None = None,
    ) -> Iterator[Found]:  # fmt: skip
        """Yield, in order, what `work` makes of each batch: its sequences, their mask, values (s, T, D) of each site.

        `wanted` (S, T): batches without a True token are left out. `work` runs in the thread of its batch.
        """
        vocab_ids, mask = token_parts.read_part(self.source, part)
        batches = [slice(*rows) for rows in ranges(len(mask), self.config.forward_batch)]
        if wanted is not None:
            batches = [rows for rows in batches if wanted[rows].any()]

        def forward(rows: slice) -> Found:
            with own_stream(device_of_source(self.model)):
                read = reading(rows)
                return work(rows, mask[rows], [read[site.name] for site in self.sites])

        with self._reading(part, vocab_ids, mask) as reading:
            yield from map_in_order(forward, batches, self.workers, self._pool)

    @contextlib.contextmanager
    def _reading(self, part: PartRecord, vocab_ids: np.ndarray, mask: np.ndarray) -> Iterator[Reading]:
        """Give what returns the activations (s, T, D) of sequences of the part, by site."""
        if isinstance(self.model, EngineFiles):
            yield RequestRows.of(self.model, self.source, part, self.sites, vocab_ids, mask).read
            return

        def read(rows: slice) -> dict[str, Tensor]:
            padding = None if mask[rows].all() else torch.from_numpy(mask[rows])
            return reader.read(torch.from_numpy(vocab_ids[rows]), padding)

        with contextlib.closing(SiteReader(self.model, self.sites)) as reader:
            yield read

    def first_lengths(self, part: PartRecord) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the lengths (s, T) at each site of the first tokens of a part, and the mask of real ones."""
        vocab_ids, mask = map(first_tokens, token_parts.read_part(self.source, part))
        with own_stream(device_of_source(self.model)), self._reading(part, vocab_ids, mask) as reading:
            found = reading(slice(0, len(mask))) if mask.any() else {}
            kind = getattr(torch, self.config.dtype)
            return {name: lengths_of(each[:, : mask.shape[1]].to(kind)) for name, each in found.items()}, mask

    def median_lengths(self, part: PartRecord) -> dict[str, float]:
        """Return the median length at each site over the first tokens of a part, in one pass."""
        lengths, mask = self.first_lengths(part)
        return {name: median_of(each[mask]) for name, each in lengths.items()}

    def selected(
        self, part: PartRecord, wanted: np.ndarray, work: Callable[[np.ndarray, list[Tensor]], Found]
    ) -> Iterator[Found]:
        """Yield, in order, what `work` makes of the `wanted` (S, T) tokens of each batch.

        `work` gets the places (n,) of the tokens in the part, and their values (n, D) at each site, rounded as on disk.
        """
        if not isinstance(self.model, EngineFiles):
            require_embedded(self.source, self.model, [part])

        def select(rows: slice, _: np.ndarray, values: list[Tensor]) -> Found:
            chosen = wanted[rows].reshape(-1).nonzero()[0]
            rounded = [to_precision(each, self.config, part, rows.start).flatten(0, 1) for each in values]
            if len(chosen) < wanted[rows].size:
                places = torch.from_numpy(chosen).to(rounded[0].device)
                rounded = [each[places] for each in rounded]
            return work(rows.start * wanted.shape[1] + chosen, rounded)

        return self.run(part, select, wanted)

    def tokens(
        self, selection: TokenSelection, most: int, held_out: bool, longest: float | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield values float32 (n, D) of each site at the selected tokens of one side of the corpus, at most `most`.

        Tokens come in the order of the store. Vectors above `longest` at the first site are passed over, but count
        towards `most`.
        """

        def short(_: np.ndarray, values: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(each.float().cpu() for each in without_long(values, longest))

        for part in selection.generation.parts:
            first = part.counts["n_train_sequences"]
            side = slice(first, None) if held_out else slice(0, first)
            wanted = np.zeros((part.counts["n_sequences"], selection.length), bool)
            wanted[side] = selection.mask(part.index, side)
            wanted.reshape(-1)[wanted.reshape(-1).nonzero()[0][most:]] = False
            most -= int(wanted.sum())
            yield from self.selected(part, wanted, short)
            if not most:
                return


def require_embedded(source: Artefact, model: nn.Module, parts: Sequence[PartRecord]) -> None:
    """Raise UserError if a token of the corpus has no row in the model's embedding."""
    vocabulary, n_rows = source.own_file("vocab.parquet"), embedding_size(model)
    if n_rows is None or pq.read_metadata(vocabulary).num_rows <= n_rows:
        return
    for part in parts:
        vocab_ids, mask = token_parts.read_part(source, part)
        beyond = vocab_ids[mask & (vocab_ids >= n_rows)]
        if len(beyond):
            piece = pq.read_table(vocabulary, columns=["piece"]).column("piece")[int(beyond[0])].as_py()
            raise UserError(
                f"model.path: the tokenizer gives {piece!r} the id {beyond[0]}, but the model's embedding has the ids "
                f"0 to {n_rows - 1}.\nWas the tokenizer extended, and the model not? Use the model's own tokenizer, or "
                "call resize_token_embeddings(len(tokenizer)) and save the model."
            )
