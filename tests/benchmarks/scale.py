"""A store of 100,000 parts: what every command does before and after its own work, in seconds and bytes of memory.

python -m tests.benchmarks.scale            100,000 parts: 2.8 million files, for half an hour about 20 GB of disk
python -m tests.benchmarks.scale --quick    5,000
python -m tests.benchmarks.scale --records  without asking, which takes as long as all other steps
python -m tests.benchmarks.scale --keep FOLDER    leaves the store there, and begins with it where it is already

Records, lists, folders, names and sizes of files and the documents' names are real; the values are not
(`tests/support/many_parts.py` says which is which). A part has 262,144 tokens of 512 neurons in 8 shards, as by
default: 2.6e10 tokens and 10 million documents. Each line is a process of its own. Seconds are those after Python's
imports, of the clock and of the processor (on a busy machine the clock says how busy it is); memory is the peak of the
whole process. How much of the folders the system has in its cache is left to it. Nothing is asked of the values:
`tests.benchmarks.queries` does that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from saeflow.activations.feed import Feed
from saeflow.corpus.ledger import Ledger, index_path
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.pipeline import collect, encode
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.parts import Executor
from saeflow.query import catalog, runs
from saeflow.query.ask import ask
from saeflow.query.connection import connect_to_run
from saeflow.recipe.settings import FeedConfig
from saeflow.runtime.memory import peak_bytes
from saeflow.runtime.progress import Progress
from saeflow.store import garbage, verify
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.benchmarks._bars import Bar, report
from tests.support.many_parts import N_SEQUENCES, SITE, WIDTH, Many

QUIET = Progress(verbosity=-1)
KINDS = ("tokens", "activations", "features")
MEMORY = 2 << 30
RECOMMENDED = 2_385
"""Parts of 10^10 tokens, as docs/scale.md recommends: they have 16 times as many tokens as by default."""
PATIENCE = 1800
ASKABLE = 2_000
"""Parts that are asked about without being compacted."""


@dataclass
class Taken:
    """What a step reports beside its seconds."""

    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        began, worked = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.processor_seconds += time.process_time() - worked


def target_of(many: Many, kind: str) -> Artefact:
    found: Artefact = getattr(many, kind)
    return many.store.by_id(found.id)


def opened(many: Many, taken: Taken, kind: str) -> None:
    target = target_of(many, kind)
    with taken.timed():
        parts = target.published().parts
    taken.facts = {"list_bytes": target.list_path(target.published().number).stat().st_size, "parts": len(parts)}


def planned(many: Many, taken: Taken) -> None:
    """What training does before its first batch, but for looking at the mixing and reading."""
    with taken.timed():
        feed = Feed(
            TokenSelection(target_of(many, "tokens")), target_of(many, "activations"), Site(SITE, WIDTH), FeedConfig()
        )
        n_batches = feed.batches_per_epoch
        pool = next(feed.pools(0))
    taken.facts = {"rows": feed.n_rows, "blocks": len(feed.blocks), "batches": n_batches, "first": len(pool.batches)}


def published(many: Many, taken: Taken, kind: str) -> None:
    target = target_of(many, kind)
    n_parts = len(target.published().parts)
    make = {"tokens": many.token_parts, "activations": many.activation_parts, "features": many.feature_parts}[kind]
    fresh = list(make(n_parts, n_parts + 10))
    target = target_of(many, kind)
    with taken.timed(), target.writing():
        target.publish([*target.published().parts, *fresh])


def verified(many: Many, taken: Taken, kind: str) -> None:
    with taken.timed():
        assert not list(verify.find_damage(target_of(many, kind), full=False))


def collected(many: Many, taken: Taken) -> None:
    """`saeflow collect` where nothing is missing."""
    with taken.timed():
        collect.run(Lineage(many.store, many.recipe), QUIET, nothing)


def encoded(many: Many, taken: Taken) -> None:
    """`saeflow encode` where nothing is missing."""
    with taken.timed():
        encode.run(Lineage(many.store, many.recipe), QUIET, nothing)


def nothing(executor: Executor) -> Executor:
    raise AssertionError("a part is missing")


def appended(many: Many, taken: Taken, first: bool) -> None:
    """What tokens are appended to: hashes of all documents of the store, the first time or when they are kept."""
    target = target_of(many, "tokens")
    generation = target.published()
    if first:
        index_path(target).unlink(missing_ok=True)
    with taken.timed():
        ledger = Ledger.read(target, generation)
    taken.facts = {"documents": len(ledger.keys), "kept_bytes": index_path(target).stat().st_size}


def swept(many: Many, taken: Taken) -> None:
    with taken.timed():
        taken.facts = {"found": len(garbage.collect_garbage(many.store, 0.0, remove=False).garbage)}


def asked(many: Many, taken: Taken) -> None:
    """A connection, a question about a feature, and `catalog.sql`."""
    with taken.timed(), contextlib.closing((opened := connect_to_run(many.store))[1]) as connection:
        taken.facts["connected"] = round(time.perf_counter() - taken.began, 1)
        for name, arguments in (("tokens_where", [7, 0.5]), ("context", [4711])):
            began = time.perf_counter()
            ask(connection, name, arguments, None, run=opened[0])
            taken.facts[name] = round(time.perf_counter() - began, 3)
    (run,) = runs.runs(many.store)
    taken.facts["files"] = sum(map(len, run.files.values()))
    taken.facts["catalog_bytes"] = len(catalog.catalog_text(many.store))


def make(many: Many, taken: Taken) -> None:
    for kind in KINDS:
        if not getattr(many, kind).generation():
            many.make(kind)


def compact(many: Many, taken: Taken) -> None:
    many.features.publish(many.compacted_parts())


PREPARATIONS = {"make": make, "compact": compact}
STEPS: dict[str, Callable[[Many, Taken], None]] = {
    **{f"open, {kind}": lambda many, taken, kind=kind: opened(many, taken, kind) for kind in KINDS},
    "plan an epoch": planned,
    **{f"publish 10 more, {kind}": lambda many, taken, kind=kind: published(many, taken, kind) for kind in KINDS},
    **{f"quick verify, {kind}": lambda many, taken, kind=kind: verified(many, taken, kind) for kind in KINDS},
    "what is to be collected": collected,
    "what is to be encoded": encoded,
    "known documents, first time": partial(appended, first=True),
    "known documents, again": partial(appended, first=False),
    "garbage": swept,
    "ask": asked,
}
ASKED = {
    "open": 1, "plan": 5, "publish": 5, "quick": 10, "what": 5, "known documents, again": 1, "garbage": 5
}  # fmt: skip
"""Seconds at most, by how the name begins."""


def measured(name: str, folder: Path, n_parts: int) -> dict[str, Any]:
    """A step in a process of its own."""
    step = ["--step", name, "--keep", str(folder), "--parts", str(n_parts)]
    try:
        command = [sys.executable, "-m", "tests.benchmarks.scale", *step]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {PATIENCE} seconds"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"signal {-done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def step(name: str, folder: Path, n_parts: int) -> None:
    taken = Taken()
    (STEPS | PREPARATIONS)[name](many_of(folder, n_parts), taken)
    about = {
        "seconds": round(taken.seconds, 2),
        "processor_seconds": round(taken.processor_seconds, 2),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(about | taken.facts))


def many_of(folder: Path, n_parts: int) -> Many:
    """The parts of the store in this folder; small files to link to come from a real store beside it."""
    scratch = Store.create(folder / "small")
    run = next(iter(scratch.artefacts("features")), None) or _made_run.make(scratch, 131_072)
    found = {}
    for target in (scratch.by_id(run.record.inputs[0]), run):
        part = target.published().parts[0]
        found |= {file.name.partition("/")[0]: target.part_path(part) / file.name for file in part.files}
    n_sequences = N_SEQUENCES if n_parts != RECOMMENDED else 16 * N_SEQUENCES
    return Many(Store.create(folder / f"store-{n_parts}"), n_parts, found, with_documents=True, n_sequences=n_sequences)


def run(folder: Path, n_parts: int, asks: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def take(name: str, step: str, place: Path = folder, n: int = n_parts) -> None:
        found[name] = measured(step, place, n)
        print(f"{name:28}", found[name], flush=True)

    measured("make", folder, n_parts)
    for name in STEPS:
        if name != "ask":
            take(name, name)
    if not asks:
        return found
    measured("make", folder / "few", ASKABLE)
    take(f"ask, {ASKABLE:,} parts as encoded", "ask", folder / "few", ASKABLE)
    for preparation in PREPARATIONS:
        measured(preparation, folder / "large", RECOMMENDED)
    take(f"ask, {RECOMMENDED:,} parts of 4M tokens, compacted", "ask", folder / "large", RECOMMENDED)
    measured("compact", folder, n_parts)
    take("ask, compacted", "ask")
    return found


def bars(found: dict[str, dict[str, Any]]) -> list[Bar]:
    made = []
    for name, each in found.items():
        most = next((seconds for start, seconds in ASKED.items() if name.startswith(start)), None)
        if most is not None:
            for clock in ("seconds", "processor_seconds"):
                made.append(Bar(f"{name}: {clock}", most, "<=", each.get(clock), reason=each.get("failed")))
        made.append(Bar(f"{name}: bytes of memory", MEMORY, "<=", each.get("peak_bytes"), reason=each.get("failed")))
    return made


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as docs/scale.md shows them."""
    lines = ["| step | seconds | of a processor | memory, GB |", "| --- | ---: | ---: | ---: |"]
    for name, each in found.items():
        taken = (
            [f"{each[clock]:.1f}" for clock in ("seconds", "processor_seconds")] if "seconds" in each else ["-", "-"]
        )
        lines.append(f"| {name} | {taken[0]} | {taken[1]} | {each.get('peak_bytes', 0) / 1e9:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5,000 parts, a few minutes")
    parser.add_argument("--keep", type=Path, help="folder for the store, which stays")
    parser.add_argument("--parts", type=int, help="other than 100,000")
    parser.add_argument("--records", action="store_true", help="without the steps that ask")
    parser.add_argument("--step", choices=[*STEPS, *PREPARATIONS], help="one step alone, of a store that is made")
    options = parser.parse_args()
    n_parts = options.parts or (5_000 if options.quick else 100_000)
    if options.step:
        return step(options.step, options.keep, n_parts)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = run(folder, n_parts, asks=not options.records)
    return report("scale", bars(found), n_parts=n_parts, figures=found)


if __name__ == "__main__":
    main()
