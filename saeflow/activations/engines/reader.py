"""The activations of one part of tokens, out of an engine's files: one sequence at a time, never a whole file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.activations.engines.layouts import Engine, Vectors, vectors_in
from saeflow.activations.engines.places import Place, place_of, places_in_words, sites_of
from saeflow.corpus.files import shown
from saeflow.corpus.requests.documents import REQUEST
from saeflow.corpus.requests.files import Request, open_safetensors, vocab_ids_of
from saeflow.corpus.requests.folder import RequestFolder
from saeflow.model.sites import Site
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord


@dataclass(frozen=True)
class EngineFiles:
    """An engine's folder, and what its files hold."""

    folder: RequestFolder
    engine: Engine
    model: Sequence[str] = ()
    """Names of the model's sites, if they are known."""

    @classmethod
    def of(cls, path: str, layers: list[int], model: Sequence[str] = ()) -> EngineFiles:
        folder = RequestFolder.of(path)
        return cls(folder, Engine.of(folder.path, layers), model)

    @cached_property
    def first(self) -> tuple[dict[Place, Vectors], tuple[str, str | None]]:
        """What the first file holds, and the engine that made it."""
        for path in self.folder.files.values():
            with open_safetensors(path, "pt") as file:
                named = self.engine.named_by(list(file.keys()), file.metadata() or {})
                return vectors_in(path, file, self.engine.layers, self.model), named
        raise UserError(f"corpus.requests: {shown(str(self.folder.path))} holds no safetensors files.")

    def sites(self, patterns: list[str]) -> list[Site]:
        """Return the sites that a recipe asks for. Raises UserError if the files do not hold one."""
        return sites_of(patterns, {place: each.width for place, each in self.first[0].items()}, self.model)

    def require_like(self, requests: Iterable[str], sites: Sequence[Site]) -> None:
        """Raise UserError that names the first file that is gone or lacks a site, or where a site has another width."""
        for request_id in requests:
            path = self.request(request_id).path
            with open_safetensors(path, "pt") as file:
                self._of_sites(path, vectors_in(path, file, self.engine.layers, self.model), sites)

    def request(self, request_id: str) -> Request:
        found = self.folder.find(request_id)
        if found is None:
            raise UserError(
                f"corpus.requests: the file of request {request_id!r} is gone from {shown(str(self.folder.path))}, or "
                "has fewer rows.\nBring it back, or leave the request out: saeflow forget KEY."
            )
        return found

    def _of_sites(self, path: Path, found: dict[Place, Vectors], sites: Sequence[Site]) -> list[Vectors]:
        chosen = [found.get(site.name, found.get(place_of(site.name))) for site in sites]
        for site, each in zip(sites, chosen, strict=True):
            if each is None or each.width != site.width:
                other = (
                    f"of width {each.width}, but other files have {site.width}"
                    if each
                    else f"only {places_in_words(found)}"
                )
                raise UserError(
                    f"corpus.requests: {shown(str(path))} holds {site.name} {other}.\n"
                    "Are these files of two runs or two models? Put them into two folders, with a recipe for each."
                )
        return [each for each in chosen if each]

    def read(self, request_id: str, start: int, vocab_ids: np.ndarray, sites: Sequence[Site]) -> list[Tensor]:
        """Return the vectors float32 (n, D) of these tokens of a request, from the token `start` on, by site.

        Raises UserError at NaN and inf, and if the file has other tokens now.
        """
        request = self.request(request_id)
        span = slice(request.start + start, request.start + start + len(vocab_ids))
        _require_same_ids(request, start, vocab_ids)
        with open_safetensors(request.path, "pt") as file:
            found = self._of_sites(request.path, vectors_in(request.path, file, self.engine.layers, self.model), sites)
            read = [_vectors(file, each, request.row or 0, span) for each in found]
        for site, values in zip(sites, read, strict=True):
            _require_finite(request, site, values, span.start)
        return read


def _require_same_ids(request: Request, start: int, vocab_ids: np.ndarray) -> None:
    if vocab_ids_of(request)[start : start + len(vocab_ids)] != tuple(vocab_ids.tolist()):
        raise UserError(
            f"corpus.requests: {shown(str(request.path))} has other token ids than when it was first read.\n"
            "Take them in first: saeflow tokens RECIPE."
        )


def _vectors(file: Any, found: Vectors, row: int, span: slice) -> Tensor:
    values = file.get_slice(found.tensor)
    if found.layer is not None:
        chosen = values[span, found.layer]
    else:
        chosen = values[span] if found.n_rows is None else values[row, span]
    return torch.as_tensor(chosen).to(torch.float32)


def _require_finite(request: Request, site: Site, values: Tensor, start: int) -> None:
    finite = torch.isfinite(values)
    if not finite.all():
        token, neuron = (int(i) for i in (~finite).nonzero()[0])
        raise UserError(
            f"corpus.requests: {shown(str(request.path))}: {site.name} is {values[token, neuron].item()} at token "
            f"{start - request.start + token}, neuron {neuron}. Nothing of this part was stored.\n"
            "Run the request again, or leave it out: saeflow forget KEY. Is the engine's dtype float16? Use bfloat16."
        )


@dataclass(frozen=True)
class RequestRows:
    """The sequences of one part of tokens, and the requests that they are of."""

    files: EngineFiles
    sites: Sequence[Site]
    vocab_ids: np.ndarray
    """(S, T)"""
    owners: np.ndarray
    """The document of each sequence, -1 if it is all padding, int64 (S,)."""
    starts: np.ndarray
    """The first position of each sequence in its request, int64 (S,)."""
    n_tokens: np.ndarray
    requests: dict[int, str]
    """The request of each document that is not hidden."""

    @classmethod
    def of(
        cls, files: EngineFiles, source: Artefact, part: PartRecord, sites: Sequence[Site], vocab_ids: np.ndarray,
        mask: np.ndarray,
    ) -> RequestRows:  # fmt: skip
        """Read which request each sequence of a part is of. `vocab_ids` and `mask` (S, T): its first sequences."""
        table = pq.read_table(source.part_file(part, "tokens.parquet"), columns=["token_id", "document_id"])
        places = np.arange(len(mask)) * mask.shape[1]
        owners = table.column("document_id").fill_null(-1).to_numpy()[places]
        first = table.column("token_id").to_numpy()[places]
        documents = documents_of(source, part)
        begins = {each["document_id"]: each["first_token_id"] or 0 for each in documents}
        starts = first - np.array([begins.get(owner, 0) for owner in owners.tolist()], np.int64)
        requests = {each["document_id"]: each[REQUEST] for each in documents}
        return cls(files, sites, vocab_ids, owners, starts, mask.sum(1), requests)

    def read(self, rows: slice) -> dict[str, Tensor]:
        """Return activations float32 (s, T, D) by site, zero at padding and at hidden documents."""
        numbers = range(*rows.indices(len(self.owners)))
        read = [torch.zeros(len(numbers), self.vocab_ids.shape[1], site.width) for site in self.sites]
        for place, row in enumerate(numbers):
            if (request := self.requests.get(int(self.owners[row]))) is not None:
                ids = self.vocab_ids[row, : self.n_tokens[row]]
                found = self.files.read(request, int(self.starts[row]), ids, self.sites)
                for out, values in zip(read, found, strict=True):
                    out[place, : len(ids)] = values
        return {site.name: values for site, values in zip(self.sites, read, strict=True)}


def documents_of(source: Artefact, part: PartRecord) -> list[dict[str, Any]]:
    """Return `document_id`, `first_token_id` and the request of each document of a part that is not hidden."""
    path = source.part_file(part, "documents.parquet")
    name = REQUEST if REQUEST in pq.read_schema(path).names else "key"
    generation = source.published()
    hidden = {each.document_id for each in generation.hidden.get(part.index, ())}
    table = pq.read_table(path, columns=list(dict.fromkeys(["document_id", "first_token_id", "key", name])))
    return [
        row | {REQUEST: str(row[name] or row["key"])} for row in table.to_pylist() if row["document_id"] not in hidden
    ]
