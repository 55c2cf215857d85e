"""A run that grows by 100 appends: what merges write again, how many parts a reader sees, what parts cost to ask.

python -m tests.benchmarks.merges            20M values in 100 appends, and the 13 parts of the demo, if `make demo` has
                                             been run: 3 GB of disk, about ten minutes
python -m tests.benchmarks.merges --quick    1M values in 100 appends, and 13 parts of 130,000 values

*Levels* merges as `saeflow run` and `ingest` do; *all at once* merges all parts whenever there are 16. Appends have
equal or log-normal sizes (sigma 1.5). Questions are asked of 13 parts as they were encoded, of the parts that levels
make of them, and of one part, in turn. A ratio is the median over a question's arguments.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saeflow.features import compaction
from saeflow.features.levels import AFTER_APPEND, plan_levels
from saeflow.pipeline.lineage import Ancestors
from saeflow.query.ask import query
from saeflow.query.connection import connect_to_run
from saeflow.recipe.settings import FeaturesConfig
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord
from saeflow.store.store import Store
from tests.benchmarks import _made_run, queries
from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks.queries import QUIET, Asked
from tests.support.growing_run import GrowingRun

PER_LEVEL = FeaturesConfig().compact_parts
AT_ONCE = 16
N_APPENDS = 100
N_PARTS = 13
ALTERNATIONS = 3
N_FEATURES = 512
DEMO = Path(__file__).parents[2] / "data" / "store"

Plan = Callable[[Sequence[PartRecord], Any], list[list[PartRecord]]]


def in_levels(parts: Sequence[PartRecord], spans: Any) -> list[list[PartRecord]]:
    return plan_levels(parts, spans, PER_LEVEL, settings=AFTER_APPEND)


def all_at_once(parts: Sequence[PartRecord], spans: Any) -> list[list[PartRecord]]:
    return compaction.plan_merges(parts, spans, AT_ONCE)


@dataclass
class Growth:
    """What a run took that grew part by part."""

    appended: int = 0
    written: int = 0
    """Bytes of parts as they were encoded, and of merged ones."""
    n_values: int = 0
    n_written: int = 0
    n_parts: tuple[int, ...] = ()
    """Parts that a reader sees, after each append."""
    longest: float = 0
    """Seconds of one append's merges."""

    @property
    def figures(self) -> dict[str, float]:
        return {
            "bytes written again, over bytes appended": round(self.written / self.appended, 2),
            "values written again, over values appended": round(self.n_written / self.n_values, 2),
            "parts a reader sees, at most": max(self.n_parts),
            "parts a reader sees, on average": round(float(np.mean(self.n_parts)), 1),
            "longest merge after one append, seconds": round(self.longest, 2),
        }


def grow(store: Store, plan: Plan) -> Growth:
    """Publish the store's run again, part by part, with the merges that follow from each."""
    run, found = the_run(store), Growth()
    every, used = run.published().parts, Ancestors(store, run).selection()
    with run.writing(), QUIET.bar("compact", None, "values") as bar:
        shown: Sequence[PartRecord] = ()
        for part in every:
            shown = run.publish([*shown, part], clear=False).parts
            began = time.perf_counter()
            for group in plan(shown, used.spans):
                merged = compaction.merge_whole_parts(run, used, group, bar)
                compaction.replace_group(run, group, merged, clear=False)
                shown = run.published().parts
                found.written += merged.n_bytes
                found.n_written += merged.counts["n_values"]
            found.longest = max(found.longest, time.perf_counter() - began)
            found.appended += part.n_bytes
            found.n_values += part.counts["n_values"]
            found.n_parts += (len(shown),)
    assert sum(part.counts["n_values"] for part in shown) == found.n_values
    return found


def planned() -> dict[str, dict[str, float]]:
    """What other numbers of parts a level would write and show: 100 equal appends, only planned."""
    found = {}
    for per_level in (2, 4, 8, 16):
        run, n_parts = GrowingRun(per_level), []
        for _ in range(N_APPENDS):
            run.append([1])
            run.merge()
            n_parts.append(len(run.parts))
        found[f"{per_level} parts a level"] = {
            "values written again, over values appended": run.written.total() / N_APPENDS,
            "parts a reader sees, at most": max(n_parts),
            "parts a reader sees, on average": round(float(np.mean(n_parts)), 1),
        }
        print(f"{per_level} parts a level, planned: {found[f'{per_level} parts a level']}", flush=True)
    return found


def the_run(store: Store) -> Artefact:
    [run] = store.artefacts("features")
    return run


def sizes(n_values: int, log_normal: bool) -> list[int]:
    """Tokens of each append, in whole sequences."""
    dice = np.random.default_rng(0)
    shares = dice.lognormal(0, 1.5, N_APPENDS) if log_normal else np.ones(N_APPENDS)
    rows = n_values / _made_run.PER_TOKEN / _made_run.LENGTH * shares / shares.sum()
    return [max(1, round(n)) * _made_run.LENGTH for n in rows]


def growths(folder: Path, n_values: int) -> tuple[list[Bar], dict[str, Any]]:
    bars, facts = [], {}
    n_levels = math.floor(math.log(N_APPENDS, PER_LEVEL))
    for kind in ("equal", "log-normal"):
        store = Store.create(folder / kind)
        _made_run.make(store, n_values, sizes(n_values, kind == "log-normal"), n_features=N_FEATURES)
        copied = copy_of(store, folder / f"{kind} again")
        levels, old = grow(store, in_levels), grow(copied, all_at_once)
        facts[kind] = {"levels": levels.figures, "all at once": old.figures}
        for name, each in facts[kind].items():
            print(f"{kind}, {name}: {each}", flush=True)
        again = levels.figures["bytes written again, over bytes appended"]
        bars += [
            Bar(f"{kind}: bytes written again, over bytes appended", n_levels, "<=", again),
            Bar(f"{kind}: parts a reader sees", (PER_LEVEL - 1) * (1 + n_levels), "<=", max(levels.n_parts)),
        ]
        for done in (store, copied):
            shutil.rmtree(done.root)
    return bars, facts


def copy_of(store: Store, folder: Path) -> Store:
    """A copy without activations."""
    shutil.copytree(store.root, folder, ignore=shutil.ignore_patterns("activations", "tmp"))
    return Store(folder)


def merge_all(store: Store, plan: Plan) -> None:
    run = the_run(store)
    used = Ancestors(store, run).selection()
    with run.writing(), QUIET.bar("compact", None, "values") as bar:
        for group in plan(run.published().parts, used.spans):
            merged = compaction.merge_whole_parts(run, used, group, bar)
            compaction.replace_group(run, group, merged, clear=False)


def thirteen_parts(folder: Path, quick: bool) -> Store:
    """The demo, if it is there and not compacted; else a made run."""
    if not quick and DEMO.is_dir() and len(the_run(Store(DEMO)).published().parts) == N_PARTS:
        return copy_of(Store(DEMO), folder / "encoded")
    per_part = 4096 if quick else 262_144
    store = Store.create(folder / "encoded")
    _made_run.make(
        store, N_PARTS * per_part * _made_run.PER_TOKEN, per_part, n_features=N_FEATURES if quick else 16_384
    )
    return store


def asked(connection: duckdb.DuckDBPyConnection) -> list[Asked]:
    """The questions of the other benchmark, and those of the README."""
    n_tokens = query(connection, "select count(*) from stg_tokens").column(0)[0].as_py()
    sources = query(connection, "select source from documents group by source order by count(*) desc, source limit 2")
    [[word]] = (
        query(
            connection,
            "select trim(piece) from tokens where regexp_matches(piece, '^ [A-Za-z]\\w{2,}$') group by piece "
            "order by abs(count(*) - 800), piece limit 1",
        )
        .to_pydict()
        .values()
    )
    every = [each for each in queries.asked(queries.counts_of(connection), n_tokens) if each.name != "source_contrast"]
    rare = next(each.arguments for each in every if each.name == "top_tokens")
    return [
        *every,
        Asked("source_contrast", "source_contrast", [sources.column(0).to_pylist()] * 4, None),
        Asked("features_on", "features_on", [[word]] * 4, None),
        Asked("feature_logits", "feature_logits", [[f] for f, _ in rare], None),
    ]


def ratios(stores: dict[str, Store]) -> dict[str, dict[str, Any]]:
    """Milliseconds of each question by store; and over those of the first store, of three alternations."""
    with contextlib.ExitStack() as stack:
        held = {name: connect_to_run(store) for name, store in stores.items()}
        for _, connection in held.values():
            stack.enter_context(contextlib.closing(connection))
        found = {}
        for each in asked(next(iter(held.values()))[1]):
            times = np.array(
                [in_turn(held.values(), each) for _ in range(ALTERNATIONS)]
            )  # (alternation, argument, store)
            over_first = np.median(times / times[:, :, :1], axis=1).round(2)
            found[each.name] = {
                name: {"ms": round(float(np.median(times[..., i])), 1), "ratios": over_first[:, i].tolist()}
                for i, name in enumerate(held)
            }
            print(f"{each.name:30}", found[each.name], flush=True)
    return found


def in_turn(opened: Collection[queries.Opened], each: Asked) -> list[list[float]]:
    """Milliseconds of each argument on each connection, warm."""
    for one in opened:
        queries.milliseconds(one, each, each.arguments[0])
    return [[queries.milliseconds(one, each, a) for one in opened] for a in each.arguments[:8]]


def questions(folder: Path, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    encoded = thirteen_parts(folder, quick)
    stores = {"one part": copy_of(encoded, folder / "one"), "levels": copy_of(encoded, folder / "levels")}
    merge_all(stores["one part"], compaction.plan_merges)
    merge_all(stores["levels"], in_levels)
    stores["13 parts"] = encoded
    n_parts = {name: len(the_run(store).published().parts) for name, store in stores.items()}
    found = ratios(stores)
    bars = [
        Bar(f"{name}, {kind}: time over one part's", 1.5, "<=", float(np.median(r)), round(float(np.ptp(r)), 2))
        for kind in ("levels", "13 parts")
        for name, each in found.items()
        for r in [each[kind]["ratios"]]
    ]
    return bars, {"parts": n_parts, "questions": found}


def main() -> None:
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        grown, facts = growths(folder, 1_000_000 if options.quick else 20_000_000)
        asked_bars, answers = questions(folder, options.quick)
    report("merges", [*grown, *asked_bars], per_level=PER_LEVEL, planned=planned(), growth=facts, **answers)


if __name__ == "__main__":
    main()
