"""Every answer is kept at once, so that nothing is asked twice, whatever is killed.

An answer is first appended to a journal in tmp/ and flushed. Later it moves to `labels/<SAE>/<source>.answers.parquet`.
It is found by a hash of the model, the messages and the sampling settings. Questions are not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from saeflow.meaning.beside_labels import changing_beside, path_beside, read_beside, write_beside
from saeflow.meaning.language_model.prompts import Prompt
from saeflow.store.files import flush, make_folder
from saeflow.store.links import open_unlinked, unlinked
from saeflow.store.store import Store

ANSWERS = pa.schema(
    {
        "key": pa.string(), "feature_id": pa.int32(), "method": pa.string(), "model": pa.string(), "text": pa.string(),
        "n": pa.int64(), "n_prompt_chars": pa.int64(), "n_prompt_tokens": pa.int64(), "n_answer_tokens": pa.int64(),
        "tokens": pa.string(), "document_ids": pa.list_(pa.int64()),
    }
)  # fmt: skip
"""One row an answer; data/README.md says what the columns mean."""


@dataclass(frozen=True)
class CachedAnswer:
    key: str
    feature_id: int
    method: str
    model: str
    text: str
    n: int
    n_prompt_chars: int
    n_prompt_tokens: int | None
    n_answer_tokens: int | None
    tokens: str
    """The artefact of tokens that the question quoted."""
    document_ids: tuple[int, ...]
    """Documents that the question quoted."""


def key_of_prompt(model: str, temperature: float, prompt: Prompt) -> str:
    """Return the hash by which an answer is found again."""
    asked = [model, temperature, prompt.most_answer_tokens, prompt.messages]
    return hashlib.blake2b(json.dumps(asked, ensure_ascii=True).encode(), digest_size=16).hexdigest()


@dataclass
class AnswerCache:
    """The answers of one source of labels: `known` holds those of the features at hand."""

    store: Store
    sae: str
    """Name and fingerprint of the SAE, without its kind."""
    source: str
    known: dict[str, CachedAnswer] = field(default_factory=dict)
    fresh: dict[str, CachedAnswer] = field(default_factory=dict)
    """Answers that are in the journal alone."""

    @property
    def path(self) -> Path:
        return path_beside(self.store, self.sae, self.source, "answers")

    @property
    def journal(self) -> Path:
        return self.store.root / "tmp" / f"answers-{self.sae}-{self.source}.jsonl"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other commands from changing the source's answers and scores inside the block, which must be short."""
        return changing_beside(self.store, self.sae, self.source)

    def load(self, features: Collection[int]) -> None:
        """Read the answers about these features, those of a killed command too."""
        table, _ = self.stored()
        chosen = table.filter(pc.is_in(table.column("feature_id"), pa.array(features, pa.int32())))
        self.known = {answer.key: answer for answer in _answers(chosen.to_pylist())}
        self.fresh = {answer.key: answer for answer in self._journaled()}
        self.known |= self.fresh

    def keep(self, answer: CachedAnswer) -> None:
        """Append an answer to the journal. It survives a kill and a power cut from here on."""
        self.known[answer.key] = self.fresh[answer.key] = answer
        make_folder(self.journal.parent)
        line = json.dumps(asdict(answer), ensure_ascii=True) + "\n"
        handle = os.open(unlinked(self.journal), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            n_bytes = os.fstat(handle).st_size
            is_torn = n_bytes > 0 and os.pread(handle, 1, n_bytes - 1) != b"\n"
            os.write(handle, b"\n" * is_torn + line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        if not n_bytes:
            flush(self.journal.parent)  # or a power cut could take the new file's name

    def fold(self) -> None:
        """Move the answers of the journal into the store."""
        if self.fresh:
            with self.locked():
                table, tag = self.stored()
                self.replace([*_answers(table.to_pylist()), *self.fresh.values()], tag)

    def replace(self, answers: Iterable[CachedAnswer], tag: str | None) -> None:
        """Make these the answers of the source in place of those with this tag, and empty the journal.

        Call it inside `locked`.
        """
        rows = sorted({answer.key: asdict(answer) for answer in answers}.values(), key=_sort_key)
        write_beside(self.store, self.path, pa.Table.from_pylist(rows, ANSWERS), tag)
        self.store.storage.remove(self.journal)
        self.fresh = {}

    def stored(self) -> tuple[pa.Table, str | None]:
        return read_beside(self.store, self.path, ANSWERS)

    def every(self) -> list[CachedAnswer]:
        """Return all answers of the source, those of the journal too."""
        return self.every_with_tag()[0]

    def every_with_tag(self) -> tuple[list[CachedAnswer], str | None]:
        """Return all answers of the source, and the tag that `replace` takes."""
        table, tag = self.stored()
        found = {answer.key: answer for answer in _answers(table.to_pylist())}
        return list((found | {answer.key: answer for answer in self._journaled()}).values()), tag

    def _journaled(self) -> Iterator[CachedAnswer]:
        """Yield the answers of the journal. The last line may be torn."""
        try:
            with open_unlinked(self.journal) as file:
                lines = file.read().decode("utf-8", "replace").split("\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield from _answers([json.loads(line)])
            except (ValueError, TypeError, KeyError):
                continue


def _answers(rows: Iterable[dict[str, object]]) -> Iterator[CachedAnswer]:
    for row in rows:
        yield CachedAnswer(**{**row, "document_ids": tuple(row["document_ids"])})  # type: ignore[arg-type]


def _sort_key(row: dict[str, object]) -> tuple[object, ...]:
    return row["feature_id"], row["method"], row["key"]
