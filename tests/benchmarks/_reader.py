"""One of many readers: a process that imports and holds only what a user's would."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from saeflow.query.api import OpenRun
from saeflow.runtime.memory import peak_bytes

FEATURES = 64


def answered(store: Path, seconds: float, place: int) -> dict[str, float]:
    """Ask until the time is up, in a process of its own. It waits until all others have opened the run."""
    with OpenRun.open(store) as run:
        last = (run.n_tokens or 1) - 1
        features = run.sql(
            "select feature_id from stg_feature_stats where n_tokens between 50 and 50000 order by hash(feature_id)",
            limit=FEATURES,
        ).column(0)
        asked = itertools.cycle(features.to_pylist())
        print("open", flush=True)
        sys.stdin.readline()
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            feature = next(asked)
            run.ask("top_tokens", feature)
            run.ask("tokens_where", feature, limit=100)
            run.ask("coactive_features", feature)
            run.ask("token_features", (feature * 7919 + place) % last)
            n += 4
        taken = time.perf_counter() - began
    return {"per_second": n / taken, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(answered(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
