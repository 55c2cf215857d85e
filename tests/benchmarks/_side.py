"""The saeflow of one checkout at work: reads names of cases, one a line, and answers each with the seconds it took.

`tests.benchmarks.before_after` starts this file with PYTHONPATH set to the checkout, so it imports nothing of tests/.
Stages run as the commands that users type, but in this process: once a case ran, imports and compilation are over.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import saeflow

FOLDER = Path(sys.argv[1])
ENTRY = sys.argv[2:4]
ABOUT: dict[str, Any] = json.loads(sys.argv[4])
"""The recipe of each store; how many batches the feed gives; how often each question is asked."""

IS_FLAT = not (Path(saeflow.__file__).parent / "pipeline").is_dir()
PLACES = {
    "Feed": ("feed.Feed", "activations.feed.Feed"),
    "FeedConfig": ("sections.FeedConfig", "recipe.settings.FeedConfig"),
    "Site": ("model.Site", "model.sites.Site"),
    "Store": ("store.Store", "store.store.Store"),
    "TokenSelection": ("used.Used", "corpus.selection.TokenSelection"),
}
"""Where classes are: in the flat state, and in packages."""

QUESTIONS: dict[str, Callable[[int], list[object]]] = {
    "top_tokens": lambda n: [n, 20],
    "tokens_where": lambda n: [n, 0.0],
    "token_features": lambda n: [97 * n],
    "context": lambda n: [97 * n],
    "coactive_features": lambda n: [n],
    "feature_histogram": lambda n: [n],
}


def ours(name: str) -> Any:
    module, _, attribute = PLACES[name][not IS_FLAT].rpartition(".")
    return getattr(import_module(f"saeflow.{module}"), attribute)


def command(name: str, store: str, *changes: str) -> None:
    """Run a stage of a store's recipe as `saeflow NAME` does. Raises RuntimeError where it refuses."""
    settings = [word for change in changes for word in ("--set", change)]
    sys.argv = ["saeflow", name, ABOUT["recipes"][store], "--store", str(FOLDER / store), "--quiet", *settings]
    try:
        getattr(import_module(ENTRY[0]), ENTRY[1])()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)}: exit code {end.code}") from end


def prepare() -> None:
    """Make what the cases read, once for all processes of a checkout."""
    if not (FOLDER / "ready").exists():
        FOLDER.mkdir()
        command("tokens", "texts")
        for name, store in (("bring", "rows"), ("train", "rows"), ("encode", "rows"), ("bring", "trained")):
            command(name, store)
        (FOLDER / "ready").touch()


@dataclass
class Taken:
    """Seconds of a block, and seconds of all processors, which other processes on the machine change less."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> Taken:
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()


def made_again(kind: str, store: str, name: str, *changes: str) -> Taken:
    """Run a stage whose artefacts were removed before."""
    shutil.rmtree(FOLDER / store / kind, ignore_errors=True)
    with Taken() as taken:
        command(name, store, *changes)
    return taken


def fed() -> Taken:
    """Read the shuffled batches of some epochs."""
    store = ours("Store").open(FOLDER / "rows")
    [stored] = store.artefacts("activations")
    source = store.by_id(stored.record.inputs[0])
    config = ours("FeedConfig")(batch_rows=4096, pool_bytes=32 << 20)
    feed = ours("Feed")(ours("TokenSelection")(source), stored, ours("Site")(*stored.record.facts["stored"][0]), config)
    batches = feed.batches()
    with Taken() as taken:
        for _ in islice(batches, ABOUT["n_batches"]):
            pass
    batches.close()
    return taken


def asked() -> Taken:
    """Open the run and ask many questions about it."""
    with Taken() as taken, saeflow.open(FOLDER / "rows") as run:
        for n in range(ABOUT["n_each"]):
            for question, arguments in QUESTIONS.items():
                run.ask(question, *arguments(n))
    return taken


CASES: dict[str, Callable[[], Taken]] = {
    "encode": lambda: made_again("features", "rows", "encode"),
    "queries": asked,
    "feed": fed,
    "collect": lambda: made_again("activations", "texts", "collect"),
    "train TopK": lambda: made_again("saes", "trained", "train", "sae.architecture=topk"),
    "train BatchTopK": lambda: made_again("saes", "trained", "train", "sae.architecture=batchtopk"),
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    prepare()
    for line in sys.stdin:
        print(json.dumps(asdict(CASES[line.strip()]())), file=answers, flush=True)


if __name__ == "__main__":
    main()
