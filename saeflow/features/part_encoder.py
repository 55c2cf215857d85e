"""One activation part to feature parts: the values of one or more SAEs, written as they are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saeflow.activations import shards
from saeflow.activations.forward import ForwardPass
from saeflow.activations.lengths import lengths_of
from saeflow.activations.sparse_values import SparseValues
from saeflow.corpus.selection import TokenSelection
from saeflow.features.files import ValuePieces, write_feature_major, write_table, write_token_major
from saeflow.features.sample import SampleWriter
from saeflow.features.schema import LEFT_OUT_TABLE
from saeflow.features.statistics import PartStatistics, TokenColumns, read_token_columns
from saeflow.model.sites import Site
from saeflow.runtime.devices import own_stream
from saeflow.runtime.progress import Bar
from saeflow.runtime.threads import ranges, use_one_thread
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.exact import feature_major
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

SEGMENT_VALUES = 24_000_000
"""Values of one part held in memory at once; a part with more gets further pairs of files."""


class Encoded(NamedTuple):
    """The values of some tokens, and the tokens (n,) among them that are too long, with their lengths."""

    token_ids: np.ndarray
    sparse: SparseValues
    left_out: tuple[np.ndarray, np.ndarray] | None = None


class PartWriter:
    """Takes the values of consecutive tokens and fills a folder; sets `counts`, which go to the part's record.

    If any are looked at for their length, the folder gets a table of those that are too long, even if there are none.
    """

    def __init__(self, folder: Path, counts: dict[str, int], tokens: TokenColumns, n_features: int) -> None:
        self.folder, self.counts, self.tokens = folder, counts, tokens
        self.counts["n_values"] = 0
        self.statistics = PartStatistics(n_features)
        self.left_out: list[pa.Table] = []
        self._pieces = ValuePieces(SEGMENT_VALUES)
        self._sample = SampleWriter(folder, n_features)

    def add(self, found: Encoded) -> None:
        """Add the values of further tokens, and note those that were left out."""
        if found.left_out is not None:
            token_ids, lengths = found.left_out
            columns = [token_ids, self.tokens.of(token_ids).vocab_ids, lengths]
            self.left_out.append(pa.table(columns, schema=LEFT_OUT_TABLE["left_out"]))
        self.take(found.token_ids, found.sparse)

    def take(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        """Add the values of further tokens. Which files they come into does not depend on how they are cut."""
        for piece in self._pieces.add(token_ids, sparse):
            self._write(*piece)

    def close(self) -> None:
        if self._pieces or not self.counts["n_values"]:
            self._write(*self._pieces.rest())
        tokens = self.tokens
        if self.left_out:
            left_out = pa.concat_tables(self.left_out)
            write_table(self.folder / "left_out.parquet", left_out)
            tokens = tokens.without(left_out.column("token_id").to_numpy())
        self.counts |= {"n_tokens": int(tokens.mask.sum())} | tokens.left_out_counts
        self.statistics.count_tokens(tokens)
        self.statistics.write(self.folder)
        self._sample.add_documents(tokens.sampled, tokens.mask)
        self._sample.close()

    def _write(self, token_ids: np.ndarray, sparse: SparseValues) -> None:
        entries = feature_major(sparse, self.statistics.n_features)
        write_token_major(self.folder, token_ids, sparse)
        write_feature_major(self.folder, token_ids, entries)
        self.statistics.add(self.tokens.of(token_ids), sparse, entries)
        self._sample.add(self.tokens.sampled, self.tokens.first_token, token_ids, sparse)
        self.counts["n_values"] += len(sparse.values)


@dataclass
class PartEncoder:
    """Encodes activation parts by one SAE: everything that is needed for each of them."""

    used: TokenSelection
    stored: Artefact
    target: Artefact
    site: Site
    sae: SparseAutoencoder
    batch_rows: int
    longest: float | None = None
    """Length above which vectors are left out."""

    def encode(self, token_ids: np.ndarray, rows: Tensor) -> Encoded:
        """Encode tokens (n,) with activations (n, D), but for those whose vectors are too long."""
        if self.longest is None:
            return Encoded(token_ids, self.sae.encode_sparse(rows))
        lengths = lengths_of(rows)
        long = lengths > self.longest
        left_out = token_ids[long], lengths[long]
        if long.any():
            token_ids, rows = token_ids[~long], rows[torch.from_numpy(~long).to(rows.device)]
        return Encoded(token_ids, self.sae.encode_sparse(rows), left_out)

    def rows(self, part: PartRecord, mask: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Selected tokens in order, at most `batch_rows` at once: token_ids (n,), activations (n, D)."""
        array = shards.open_site(self.stored, part, self.site)
        length = mask.shape[1]
        block = array.chunk
        for start in range(0, len(mask), block):
            keep = np.flatnonzero(mask[start : start + block])
            token_ids = (part.counts["first_sequence"] + start) * length + keep
            values = array.read(slice(start, start + block)).reshape(-1, self.site.width)
            for at in range(0, len(keep), self.batch_rows):
                chosen = keep[at : at + self.batch_rows]
                rows = values[at : at + len(chosen)] if len(keep) == len(values) else values[torch.from_numpy(chosen)]
                yield token_ids[at : at + len(chosen)], rows


def encode_together(
    encoders: Sequence[PartEncoder], part: PartRecord, bar: Bar, forward: ForwardPass | None = None
) -> list[PartRecord]:
    """Encode one activation part for several SAEs in one reading.

    `forward` runs the model, if activations are not kept. Without it, the SAEs must read one site.
    """
    use_one_thread()
    used = encoders[0].used
    about = read_token_columns(used, part.index)
    mask = about.mask.reshape(-1, used.length)
    inputs = part_inputs(used, part)
    with contextlib.ExitStack() as stack:
        writers = []
        for encoder in encoders:
            counts: dict[str, int] = {}
            folder = stack.enter_context(encoder.target.new_part(part.index, counts, inputs))
            writers.append(PartWriter(folder, counts, about, encoder.sae.config.n_features))
        for n_tokens, found in (
            _stored_batches(encoders, part, mask) if forward is None else _run(forward, encoders, part, mask)
        ):
            for writer, encoded in zip(writers, found, strict=True):
                writer.add(encoded)
            bar.advance(n_tokens)
        for writer in writers:
            writer.close()
    return [encoder.target.made[part.index] for encoder in encoders]


_Batch = tuple[int, list[Encoded]]
"""How many tokens were read, and what each SAE made of them."""


def _stored_batches(encoders: Sequence[PartEncoder], part: PartRecord, mask: np.ndarray) -> Iterator[_Batch]:
    """Encode stored activations, on this thread."""
    with own_stream(encoders[0].sae.W_enc.device):
        for token_ids, rows in encoders[0].rows(part, mask):
            yield len(token_ids), [encoder.encode(token_ids, rows) for encoder in encoders]


def _run(forward: ForwardPass, encoders: Sequence[PartEncoder], part: PartRecord, mask: np.ndarray) -> Iterator[_Batch]:
    """Encode what the model gives, each batch in the thread that runs it: while one encodes, others run the model."""
    at = [forward.sites.index(encoder.site) for encoder in encoders]
    first, n_rows = part.counts["first_sequence"] * mask.shape[1], encoders[0].batch_rows

    def encode(places: np.ndarray, values: list[Tensor]) -> list[_Batch]:
        pieces = [slice(*ends) for ends in ranges(len(places), n_rows)]
        return [
            (
                len(places[rows]),
                [e.encode(first + places[rows], values[i][rows]) for e, i in zip(encoders, at, strict=True)],
            )
            for rows in pieces
        ]

    for batch in forward.selected(encoders[0].used.parts[part.index], mask, encode):
        yield from batch


def part_inputs(used: TokenSelection, part: PartRecord) -> dict[str, str]:
    """What the values of an activation part follow from."""
    hidden = used.generation.hidden_digest(part.index)
    inputs = {"tokens": used.parts[part.index].folder, "activations": part.folder}
    return inputs | ({"hidden": hidden} if hidden else {})
