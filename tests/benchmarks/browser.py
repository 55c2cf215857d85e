"""Pages over a compacted run of 100 million values: seconds, bytes, pages a second, memory.

python -m tests.benchmarks.browser            100M values of 16,384 and of 131,072 features (4 GB of disk, half an hour)
python -m tests.benchmarks.browser --quick    3M values of 4,096 features

The server is a process of its own, asked over loopback. Each feature is asked once, so nothing is in a cache but what
every page shares. *Filtered*: one source, and a value above the feature's mean. Memory is the server's resident set.
"""

from __future__ import annotations

import tempfile
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from saeflow.query.connection import connect
from saeflow.store.store import Store
from tests.benchmarks import _made_run
from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks.queries import compact
from tests.support.served_pages import served

N_PAGES, N_CLIENTS, N_REQUESTS = 60, 4, 10_000


def asked(client: httpx.Client, address: str) -> tuple[float, int]:
    """Milliseconds and bytes of a page."""
    began = time.perf_counter()
    answer = client.get(address)
    answer.raise_for_status()
    return 1e3 * (time.perf_counter() - began), len(answer.content)


def by_four_clients(addresses: Sequence[str]) -> None:
    """Ask for every address, each client over a connection of its own that stays open, as a browser's does."""
    here = threading.local()

    def ask(address: str) -> None:
        if not hasattr(here, "client"):
            here.client = httpx.Client(timeout=60)
        here.client.get(address).raise_for_status()

    with ThreadPoolExecutor(N_CLIENTS) as clients:
        list(clients.map(ask, addresses))


def measured(store: Store, n_features: int, n_pages: int, n_requests: int) -> dict[str, Any]:
    with closing(connect(store)) as connection:
        live = connection.execute(
            "select feature_id, mean_value from feature_summary where n_tokens > 0 order by hash(feature_id)"
        ).fetchall()
    features = iter(live)
    with served(Path(store.root)) as (address, process), httpx.Client(timeout=60) as client:
        run = f"{address}/runs/made"

        def pages(paths: Sequence[str]) -> np.ndarray:
            return np.array([asked(client, f"{run}{path}") for path in paths])

        def filtered(feature: int, mean: float) -> str:
            query = urllib.parse.urlencode({"source": "source 2", "threshold": mean})
            return f"/features/{feature}?{query}"

        asked(client, f"{run}/features/0")
        plain = pages([f"/features/{f}" for f, _ in islice(features, n_pages)])
        under_filter = pages([filtered(*each) for each in islice(features, n_pages)])
        lists = pages([f"/features?sort={sort}" for sort in islice(cycle(["interesting", "density", "max", "id"]), 20)])
        chosen = [f"{run}/features/{f}" for f, _ in islice(features, 4 * n_pages)]
        began = time.perf_counter()
        by_four_clients(chosen)
        per_second = len(chosen) / (time.perf_counter() - began)
        before = process.memory_info().rss
        by_four_clients([f"{run}/features/{f}" for f, _ in islice(cycle(live), n_requests)])
        after = process.memory_info().rss
    return {
        "n_features": n_features, "feature_ms": quantiles(plain[:, 0]), "feature_bytes": int(np.median(plain[:, 1])),
        "filtered_ms": quantiles(under_filter[:, 0]), "list_ms": quantiles(lists[:, 0]), "pages_per_s": per_second,
        "memory_bytes": [before, after], "n_requests": n_requests,
    }  # fmt: skip


def quantiles(times: np.ndarray) -> list[float]:
    """Median and 95th percentile."""
    return [round(float(each), 1) for each in np.quantile(times, [0.5, 0.95])]


def bars(found: dict[str, Any]) -> list[Bar]:
    about = f"{found['n_features']:,} features"
    before, after = found["memory_bytes"]
    return [
        Bar(f"feature page, median milliseconds, {about}", 150, "<=", found["feature_ms"][0]),
        Bar(f"feature page, bytes, {about}", 60_000, "<=", found["feature_bytes"]),
        Bar(f"filtered feature page, median milliseconds, {about}", 300, "<=", found["filtered_ms"][0]),
        Bar(f"list, median milliseconds, {about}", 100, "<=", found["list_ms"][0]),
        Bar(f"pages a second, four clients, {about}", 12, ">=", round(found["pages_per_s"], 1)),
        Bar(f"memory after {found['n_requests']:,} pages over before, {about}", 1.25, "<=", round(after / before, 3)),
    ]


def main() -> None:
    quick = arguments(__doc__).quick
    sizes = [(3_000_000, 4_096)] if quick else [(100_000_000, 16_384), (100_000_000, 131_072)]
    found = []
    for n_values, n_features in sizes:
        with tempfile.TemporaryDirectory(prefix="saeflow-browser-") as folder:
            store = Store.create(Path(folder) / "store")
            run = _made_run.make(store, n_values, n_features=n_features)
            compact(run, store.by_id(run.record.inputs[0]))
            n_pages, n_requests = (15, 100) if quick else (N_PAGES, N_REQUESTS)
            found.append(measured(store, n_features, n_pages, n_requests))
            print(found[-1], flush=True)
    report("browser", [bar for each in found for bar in bars(each)], pages=found)


if __name__ == "__main__":
    main()
