"""Requests, bytes and seconds of every named question to a store in a bucket whose server answers 20 ms late.

python -m tests.benchmarks.buckets            the demo's store in data/store (`make demo`), a quarter of an hour
python -m tests.benchmarks.buckets --quick    ten questions to a made run of a million values

The server speaks S3 on loopback, in a process of its own, and counts what it answers. *Cold*: nothing of the store is
on this machine. *Warm*: the question again, over a new connection to a store that is opened anew. Each answer is
compared with the local store's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from saeflow.query.ask import ask, names_read, query
from saeflow.query.catalog import OF_EVERY_RUN
from saeflow.query.connection import connect_to_run
from saeflow.query.files.chosen import chosen_files
from saeflow.query.files.cost import count_files
from saeflow.query.outside.supply import supply
from saeflow.query.questions import Question, parse_arguments, questions
from saeflow.query.runs import runs
from saeflow.runtime.errors import UserError
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks.queries import nearest
from tests.support.s3_server import Request, Server, s3_server

LATENCY = 0.02
DEMO = Path("data/store")
LIMIT = 50
"""Rows of an answer, as a page or a terminal asks for."""

QUICK = (
    "coactive_features", "context", "contexts", "document_features", "feature_histogram", "feature_summary", "runs",
    "token_features", "tokens_where", "top_tokens",
)  # fmt: skip
OF_ONE_FEATURE = ("tokens_where", "top_tokens", "contexts", "feature_values", "feature_quantile_examples")


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as temporary, s3_server() as server:
        folder = Path(temporary)
        store = _made(folder / "store") if options.quick else _demo()
        changes = server.environment | {"SAEFLOW_CACHE": str(folder / "cache")}
        with patch.dict(os.environ, changes):
            url = f"{server.bucket('bucket')}/store"
            server.upload(store.root, "bucket", "store", is_read)
            server.delay(LATENCY)
            asked = [each for each in questions() if each.name in QUICK or not options.quick]
            found = measured(server, store, url, folder / "cache", asked)
            listed, n_files = bars(found, store), n_files_of(store)
    report("buckets", listed, latency_s=LATENCY, files_of_run=n_files, questions=found)


def _made(folder: Path) -> Store:
    store = Store.create(folder)
    _made_run.make(store, 1_000_000, part_tokens=16_384)
    return store


def _demo() -> Store:
    if not (DEMO / "store.json").is_file():
        raise UserError(f"There is no {DEMO}. Make it: `make demo`.")
    return Store.open(DEMO)


def n_files_of(store: Store) -> int:
    """Return how many files the newest run has."""
    return sum(len(paths) for table, paths in runs(store)[0].files.items() if table != "unmarked_tokens")


def is_read(name: str) -> bool:
    """True if a question may read a file of a store: no question reads activations."""
    return not name.startswith("tmp/") and not (name.startswith("activations/") and "/parts/" in name)


def measured(
    server: Server, store: Store, url: str, cache: Path, asked: Sequence[Question]
) -> dict[str, dict[str, Any]]:
    """Ask the questions of the local store and of the bucket, cold and warm."""
    values = arguments_of(store)
    found = {}
    for question in asked:
        known = values | (dict.fromkeys(("a", "b"), values["other_run"]) if question.name in OF_EVERY_RUN else {})
        names = [each.name for each in question.parameters if each.default is None or each.name == "tokens"]
        given = {name: known[name] for name in names if name in known}
        shutil.rmtree(cache, ignore_errors=True)
        expected, files, _ = answered(str(store.root), question, given)
        found[question.name] = files
        for state in ("cold", "warm"):
            server.requests()
            table, _, seconds = answered(url, question, given)
            found[question.name][state] = {"seconds": seconds, **spent(server.requests())}
            if not same(table, expected):
                raise SystemExit(f"{question.name} answers otherwise in a bucket.")
        print(f"{question.name:28}", found[question.name], flush=True)
    return found


def answered(store: str, question: Question, given: Mapping[str, Any]) -> tuple[pa.Table, dict[str, Any], float]:
    """Return the answer as a command finds it, how many files it may be in, and the seconds it took."""
    began = time.perf_counter()
    opened = Store.open(store)
    values = parse_arguments(question, given)
    run, connection = connect_to_run(opened, names=names_read(question, values))
    with contextlib.closing(connection):
        readings = supply(opened, run, connection, question, values)
        table = ask(connection, question.name, given, LIMIT, readings, run)
        seconds = time.perf_counter() - began
        of_values = sum(map(len, chosen_files(run.value_files, run.number, values).values()))
        files = {"files": count_files(run, question.name, values)[0], "files_of_chosen_values": of_values}
        return table, files, round(seconds, 3)


def arguments_of(store: Store) -> dict[str, Any]:
    """Return a value for each parameter that must be given, about features that fire on some hundred tokens."""
    run, connection = connect_to_run(store)
    with contextlib.closing(connection):
        counts = query(connection, "select n_tokens from feature_summary order by feature_id").column(0).to_numpy()
        feature, other = nearest(np.nan_to_num(counts), 300, 2)
        about = query(connection, "select source, key from documents where n_tokens > 100 order by hash(key)")
        word = query(connection, "select vocab_id, piece from stg_vocab where vocab_id = 260").to_pylist()[0]
    sources = sorted({*about.column("source").to_pylist()})
    token = int(run.n_tokens or 0) // 2
    return {
        "feature": feature, "other": other, "features": [feature, other], "matches": [other, feature],
        "thresholds": [0.0, 0.0], "window": 5, "token": token, "tokens": [token, token + 1, token // 2],
        "vocab": word["vocab_id"], "text": word["piece"], "document_key": about.column("key")[0].as_py(),
        "first_char": 0, "end_char": 20, "a": sources[0], "b": sources[-1], "annotation": "none", "class": "none",
        "other_run": run.schema,
    }  # fmt: skip


def spent(requests: Iterable[Request]) -> dict[str, Any]:
    answered = list(requests)
    return {"requests": dict(Counter(each.kind for each in answered)), "bytes": sum(each.n_bytes for each in answered)}


def same(one: pa.Table, other: pa.Table) -> bool:
    return sorted(map(repr, one.to_pylist())) == sorted(map(repr, other.to_pylist()))


def n_requests(each: Mapping[str, Any]) -> int:
    return sum(each["requests"].values())


def bars(found: Mapping[str, dict[str, Any]], store: Store) -> list[Bar]:
    both = [each[state] for each in found.values() for state in ("cold", "warm")]
    warm = [each["warm"] for each in found.values()]
    kinds, artefacts = len({each.kind for each in store.artefacts()}), len(store.artefacts())
    of_one = [each for name, each in found.items() if name in OF_ONE_FEATURE]
    dearer = sum(n_requests(each["warm"]) > n_requests(each["cold"]) for each in found.values())
    gets = [each["warm"]["requests"].get("GET", 0) / each["files_of_chosen_values"] for each in of_one]
    return [
        Bar("questions whose answers are the local store's", len(found), ">=", len(found)),
        Bar("HEAD requests of all questions", 0, "<=", sum(each["requests"].get("HEAD", 0) for each in both)),
        Bar("questions with more requests warm than cold", 0, "<=", dearer),
        Bar(
            "LIST requests of a question, warm",
            2 + kinds + 2 * artefacts, "<=", max(each["requests"].get("LIST", 0) for each in warm),
        ),
        Bar("GET requests for each file that may hold a feature's values, warm", 2, "<=", max(gets)),
        Bar("requests of the median question, warm", 30, "<=", float(np.median([n_requests(each) for each in warm]))),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
