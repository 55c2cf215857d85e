"""Seconds and memory that `saeflow annotate` takes for ten million spans of characters.

python -m tests.benchmarks.annotate            10,000,000 spans in 10,485,760 tokens, 50 classes (a minute)
python -m tests.benchmarks.annotate --quick    300,000 spans in 524,288 tokens

Documents have 1,000 tokens of 1 to 8 characters. A span begins anywhere and has 1 to 40 characters. The steps are those
of the command between the reading of the file and the publication. A sample is compared with a look at each token.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.classes.annotations import write_annotations
from saeflow.classes.characters import find_characters, read_marks
from saeflow.classes.places import find_places
from saeflow.classes.tables import opened_table, store_rows
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.benchmarks._bars import Bar, arguments, report

PART_TOKENS, DOCUMENT_TOKENS, N_CLASSES = 262_144, 1_000, 50
MEMORY_LIMIT = "3GB"


def made_tokens(store: Store, n_parts: int) -> tuple[Artefact, pa.Table]:
    """Tokens of documents that lie end to end, and the documents with the length of their texts."""
    tokens, dice = store.artefact("tokens", "made", "00000000"), np.random.default_rng(0)
    tokens.create({"context_length": 64})
    documents, first = [], 0
    for index in range(n_parts):
        token_id = np.arange(PART_TOKENS) + index * PART_TOKENS
        document = np.arange(PART_TOKENS) // DOCUMENT_TOKENS
        lengths = dice.integers(1, 9, PART_TOKENS)
        ends = np.cumsum(lengths)
        begins = np.flatnonzero(np.diff(document, prepend=-1))
        ends -= np.repeat((ends - lengths)[begins], np.diff(np.append(begins, PART_TOKENS)))
        with tokens.new_part(index, {"n_tokens": PART_TOKENS, "n_offsets": PART_TOKENS}) as folder:
            columns = {
                "token_id": token_id, "document_id": document + first, "mask": np.ones(PART_TOKENS, bool),
                "char_start": (ends - lengths).astype(np.int32), "char_end": ends.astype(np.int32),
            }  # fmt: skip
            pq.write_table(pa.table(columns), folder / "tokens.parquet")
        sizes = np.diff(np.append(begins, PART_TOKENS))
        documents.append(
            pa.table({"document_id": document[begins] + first, "first_token_id": token_id[begins], "n_tokens": sizes,
                      "n_chars": ends[np.append(begins[1:], PART_TOKENS) - 1]})
        )  # fmt: skip
        first += len(begins)
    tokens.publish(tokens.parts().values())
    return tokens, pa.concat_tables(documents)


def made_spans(path: Path, documents: pa.Table, n_spans: int) -> pa.Table:
    """Write a file of spans; return them with the numbers of their documents."""
    dice = np.random.default_rng(1)
    mine = dice.integers(0, len(documents), n_spans)
    start = (dice.random(n_spans) * np.asarray(documents.column("n_chars"))[mine]).astype(np.int64)
    spans = pa.table(
        {
            "class": pa.DictionaryArray.from_arrays(
                dice.integers(0, N_CLASSES, n_spans).astype(np.int32), [f"class {n:02d}" for n in range(N_CLASSES)]
            ),
            "document": pa.array(np.char.add("made/document-", mine.astype(str))),
            "start": start,
            "end": start + dice.integers(1, 41, n_spans),
        }
    )
    pq.write_table(spans, path)
    return spans.append_column("document_id", documents.column("document_id").take(pa.array(mine)))


def n_wrong(tokens: Artefact, spans: pa.Table, written: Path, sample: int = 200) -> int:
    """Count sampled spans of which some token lacks the class in the written file."""
    found = pq.read_table(written)
    marks = read_marks(tokens.part_file(tokens.published().parts[0], "tokens.parquet"))
    rows = spans.filter(pc.less_equal(spans.column("document_id"), int(marks.document_id.max()))).slice(0, sample)
    wrong = 0
    for row in rows.to_pylist():
        covers = (
            (marks.document_id == row["document_id"])
            & (marks.char_start < row["end"])
            & (marks.char_end > row["start"])
        )
        mine = found.filter(pc.equal(found.column("class"), row["class"]))
        first, last = (np.asarray(mine.column(name)) for name in ("first_token_id", "last_token_id"))
        place = np.searchsorted(first, marks.token_id[covers], side="right") - 1
        wrong += not (last[place] >= marks.token_id[covers]).all()
    return wrong


def main() -> None:
    n_parts, n_spans = (2, 300_000) if arguments(__doc__).quick else (40, 10_000_000)
    with tempfile.TemporaryDirectory() as name, contextlib.closing(duckdb.connect()) as connection:
        folder = Path(name)
        tokens, documents = made_tokens(Store.create(folder / "store"), n_parts)
        spans = made_spans(folder / "given.parquet", documents, n_spans)
        connection.execute(f"set memory_limit = '{MEMORY_LIMIT}'")
        connection.execute(f"set temp_directory = '{folder}/spill'")
        connection.register("made", documents)
        connection.execute("create table stg_documents as select *, 'made/document-' || document_id as key from made")
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with opened_table(connection, folder / "given.parquet", None) as rows:
            columns = store_rows(connection, rows, "x")
        read = time.perf_counter() - began
        unmatched = find_places(connection, columns)
        placed = time.perf_counter() - began
        find_characters(connection, tokens, unmatched, Progress(verbosity=-1))
        looked_up = time.perf_counter() - began
        write_annotations(connection, folder)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = n_wrong(tokens, spans, folder / "spans.parquet")
        report(
            "annotate",
            [
                Bar("spans per second", 50_000, ">=", round(n_spans / seconds)),
                Bar("sampled spans that are wrong", 0, "<=", wrong),
            ],
            n_spans=n_spans, n_tokens=n_parts * PART_TOKENS, n_matched=unmatched.n_matched, seconds=round(seconds, 1),
            seconds_of_steps=[round(each, 1) for each in (read, placed, looked_up, seconds)],
            peak_gb=round(peak / 1e6, 2), made_before_gb=round(before / 1e6, 2),
        )  # fmt: skip


if __name__ == "__main__":
    main()
