"""Seconds and CPU that Prefect and Dask add to parts of no work, and the share of Prefect in the demo.

python -m tests.benchmarks.orchestration            1, 100, 1,000 parts, a small recipe, the demo, thrice (half an hour)
python -m tests.benchmarks.orchestration --quick    1 and 100 parts, the small recipe once

Parts are mapped as the flows map them: one at a time, as in collection, and one a core, as in encoding; on a server
that runs already, and on the temporary one that a command starts for itself. *CPU* is that of the client, and of the
server until it is at rest again: it writes down what happened after the flow has ended. What is added is less a plain
loop over the same parts.

The share in a recipe is, with work, the time of its flow in which none of saeflow's own functions is at work; with
everything finished, the seconds of `python -m flows.pipeline RECIPE` over those of `saeflow run RECIPE`, starts and
answers included.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from distributed import Client, LocalCluster

from tests.benchmarks._bars import Bar, arguments, report
from tests.benchmarks._no_work import cpu_of
from tests.support.prefect_server import ROOT, Server, prefect_server
from tests.support.small_pipeline import Ingredients, recipe_data, write_recipe

DEMO = ROOT / "flows" / "recipes" / "demo.toml"
WORKERS = {"one at a time": 1, "one a core": os.cpu_count() or 1}


def folder_of(index: int) -> str:
    """What a part of no work returns."""
    return f"{index:06d}-00000000"


def last_line(env: Mapping[str, str], *arguments: object) -> dict[str, float]:
    """What a module prints last."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(env), check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def at_rest(processes: list[psutil.Process]) -> float:
    """CPU seconds of processes, once they use less than a tenth of a core for three seconds."""
    used = [cpu_of(processes)]
    for _ in range(300):
        time.sleep(1)
        used.append(cpu_of(processes))
        if len(used) > 3 and used[-1] - used[-4] < 0.3:
            break
    return used[-1]


def on_a_server(server: Server, n_parts: int, workers: int) -> dict[str, float]:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    before = at_rest(family)
    found = last_line(server.env, "tests.benchmarks._no_work", n_parts, workers)
    return found | {"server_cpu": at_rest(family) - before}


def of_its_own(home: Path, n_parts: int, workers: int) -> dict[str, float]:
    """With the temporary server, whose CPU is counted until the flow has ended."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return last_line(given | {"PREFECT_HOME": str(home)}, "tests.benchmarks._no_work", n_parts, workers)


def by_dask(sizes: list[int]) -> dict[str, dict[str, float]]:
    """Records of no work from two processes on this machine; `start` is what the cluster itself takes."""
    me, found, began = psutil.Process(), {}, time.monotonic()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.gather(client.map(folder_of, [-1], pure=False))
        found["start"] = {"seconds": time.monotonic() - began}
        family = [me, *me.children(recursive=True)]
        for n_parts in sizes:
            began, cpu = time.monotonic(), cpu_of(family)
            assert len(client.gather(client.map(folder_of, range(n_parts), pure=False))) == n_parts
            found[str(n_parts)] = {"seconds": time.monotonic() - began, "cpu": cpu_of(family) - cpu}
    return found


def by_a_loop(n_parts: int) -> float:
    began = time.monotonic()
    assert len([folder_of(index) for index in range(n_parts)]) == n_parts
    return time.monotonic() - began


def taken_by(env: Mapping[str, str], *command: object) -> tuple[float, float]:
    """Seconds of a command, and CPU seconds of it and of all that it started and saw the end of."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(list(map(str, command)), cwd=ROOT, env=dict(env), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def shares(recipe: Path, folder: Path, times: int, work_times: int) -> dict[str, list[float]]:
    """Seconds that Prefect's coat adds to a recipe in fresh stores, and to one that is finished, there with the
    CPU's."""
    env = dict(os.environ) | {"PREFECT_HOME": str(folder / "prefect")}
    found: dict[str, list[float]] = {"with work": [], "finished": [], "finished, CPU": []}
    store = folder / f"{recipe.stem}-store"
    for number in range(work_times):
        store = folder / f"{recipe.stem}-{number}"
        taken = last_line(env, "tests.benchmarks._share", recipe, store)
        found["with work"].append(taken["seconds"] - taken["work"])
        print(f"  {recipe.stem} with work: {taken['seconds']:.1f} s, {taken['work']:.1f} s of them work", flush=True)
    plain, coated = ("-c", "from saeflow.cli.app import main; main()", "run"), ("-m", "flows.pipeline")
    for _ in range(times):
        with_prefect = taken_by(env, sys.executable, *coated, recipe, "--store", store)
        without = taken_by(env, sys.executable, *plain, recipe, "--store", store)
        for kind, a, b in zip(("finished", "finished, CPU"), with_prefect, without, strict=True):
            found[kind].append(a - b)
        said = "{:.1f} s (CPU {:.1f} s)"
        print(
            f"  {recipe.stem} finished: with Prefect {said}, without {said}".format(*with_prefect, *without), flush=True
        )
    return found


def parts_of_no_work(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Figures by kind of server, mapping, and number of parts."""
    found: dict[str, Any] = {"loop": {str(n): by_a_loop(n) for n in sizes}}
    with prefect_server(folder / "server") as server:
        on_a_server(server, 1, 1)  # the first run of a fresh database
        for name, workers in WORKERS.items():
            for n in sizes:
                found.setdefault(f"running server, {name}", {})[str(n)] = on_a_server(server, n, workers)
                print(f"  running server, {name}, {n} parts: {found[f'running server, {name}'][str(n)]}", flush=True)
    home = folder / "temporary"
    found["temporary server, its first start"] = {"1": of_its_own(home, 1, 1)}
    found["temporary server"] = {str(n): of_its_own(home, n, 1) for n in sizes}
    found["dask"] = by_dask(sizes)
    for name in ("temporary server, its first start", "temporary server", "dask"):
        print(f"  {name}: {found[name]}", flush=True)
    return found


def bars(parts: Mapping[str, Any], sizes: list[int], share: Mapping[str, Mapping[str, list[float]]]) -> list[Bar]:
    made = []
    for recipe, kinds in share.items():
        for kind, seconds in kinds.items():
            if kind.endswith("CPU"):
                continue
            spread = max(seconds) - min(seconds) if len(seconds) > 1 else None
            made.append(Bar(f"seconds Prefect adds to {recipe}, {kind}", 25, "<=", statistics.median(seconds), spread))
    for name in [each for each in parts if each.startswith(("running", "temporary")) and str(sizes[-1]) in parts[each]]:
        for n in sizes[1:]:
            taken, alone = parts[name][str(n)], parts[name]["1"]
            added = (taken["seconds"] - alone["seconds"] - parts["loop"][str(n)]) / (n - 1)
            made.append(Bar(f"ms added per part, {n} parts, {name}", 100, "<=", 1000 * added))
            cpu = (taken["client_cpu"] + taken["server_cpu"] - alone["client_cpu"] - alone["server_cpu"]) / (n - 1)
            made.append(Bar(f"ms of CPU per part, client and server, {n} parts, {name}", 100, "<=", 1000 * cpu))
    for n in sizes[1:]:
        made.append(Bar(f"ms added per part, {n} parts, Dask", 100, "<=", 1000 * parts["dask"][str(n)]["seconds"] / n))
    return made


def main() -> None:
    quick = arguments(__doc__).quick
    sizes = [1, 100] if quick else [1, 100, 1000]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="saeflow-orchestration-", dir=ROOT / "data") as temporary:
        folder = Path(temporary)
        parts = parts_of_no_work(folder, sizes)
        small = write_recipe(folder / "small.toml", recipe_data(Ingredients.write(folder)))
        share = {"the small recipe": shares(small, folder, 1 if quick else 3, 1 if quick else 3)}
        if not quick:
            print(f"  load {os.getloadavg()[0]:.1f} before the demo", flush=True)
            share["the demo"] = shares(DEMO, folder, 3, 1)
    report("orchestration", bars(parts, sizes, share), load=[load, os.getloadavg()[0]], parts=parts, shares=share)


if __name__ == "__main__":
    main()
