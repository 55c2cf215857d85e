"""What an answer cost: the files it may be in, requests, bytes and seconds."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from saeflow.query.catalog import OF_EVERY_RUN, with_what_they_read
from saeflow.query.files.chosen import chosen_files
from saeflow.query.runs import Run
from saeflow.runtime.text import human_bytes
from saeflow.store.storage.folder import Storage
from saeflow.store.storage.traffic import Traffic


@dataclass(frozen=True)
class Spent:
    """Seconds, and what the storage was asked for meanwhile."""

    seconds: float
    traffic: Traffic

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 4),
            "requests": dict(self.traffic.requests),
            "bytes_read": self.traffic.n_bytes,
            "bytes_from_cache": self.traffic.cached_bytes,
        }

    def __str__(self) -> str:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.traffic.requests.items()))
        n_bytes = self.traffic.n_bytes
        said = [f"{self.seconds:.2f} s", *([f"requests: {kinds}"] if kinds else [])]
        said += [] if n_bytes is None else [f"{human_bytes(n_bytes)} read"]
        said += [f"{human_bytes(self.traffic.cached_bytes)} from the cache"] if self.traffic.cached_bytes else []
        return "; ".join(said)


class Watch:
    """Says what was spent since it was started, or since it said so last."""

    def __init__(self, storage: Storage | None = None) -> None:
        """`storage`: one that is open already."""
        self._began, self._before = time.perf_counter(), storage.traffic() if storage else Traffic()

    def spent(self, storage: Storage) -> Spent:
        now, traffic = time.perf_counter(), storage.traffic()
        found = Spent(now - self._began, traffic - self._before)
        self._began, self._before = now, traffic
        return found


@dataclass(frozen=True)
class Cost:
    """What one answer cost."""

    n_files: int
    """Files of the run that the question may open."""
    n_files_of_run: int
    n_rows: int
    answer_bytes: int
    connecting: Spent
    """To open the store and make the views: once a connection."""
    asking: Spent

    @classmethod
    def of(
        cls, run: Run, question: str, values: Mapping[str, Any], answer: pa.Table, connecting: Spent, asking: Spent
    ) -> Cost:
        files = count_files(run, question, values)
        return cls(*files, answer.num_rows, answer.nbytes, connecting, asking)

    def as_json(self) -> str:
        """Return one line."""
        about = {
            "files": self.n_files,
            "files_of_run": self.n_files_of_run,
            "rows": self.n_rows,
            "answer_bytes": self.answer_bytes,
            "connecting": self.connecting.as_dict(),
            "asking": self.asking.as_dict(),
        }
        return json.dumps(about)

    def __str__(self) -> str:
        return (
            f"files:      {self.n_files:,} of {self.n_files_of_run:,} may hold the answer\n"
            f"answer:     {self.n_rows:,} rows, {human_bytes(self.answer_bytes)}\n"
            f"connecting: {self.connecting}\n"
            f"asking:     {self.asking}"
        )


def count_files(run: Run, question: str, values: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many files of the run a question with these arguments may open, and how many the run has."""
    files = {table: len(paths) for table, paths in run.files.items() if table != "unmarked_tokens"}
    if run.looks_up is not None:  # the connection does not read the blocks
        files["vocab_blocks"] = len(run.vocab_id_files or ())
    files["annotations"], files["labels"] = len(run.annotations), len(run.labels)
    files |= Counter(each.table for each in run.probes) | Counter(each.table for each in run.beside_labels)
    read = with_what_they_read([question])
    needed = {table: n for table, n in files.items() if f"src_{table}" in read}
    chosen = {} if question in OF_EVERY_RUN else chosen_files(run.value_files, run.number, values)
    needed |= {table: len(paths) for table, paths in chosen.items() if table in needed}
    return sum(needed.values()), sum(files.values())
