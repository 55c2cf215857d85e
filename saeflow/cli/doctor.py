"""What this machine has: versions, processor, speeds, free space, and what to fix."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from saeflow import __version__
from saeflow.cli.common import StoreOption, new_table, out

doctor_commands = typer.Typer()

PACKAGES = ["torch", "transformers", "zarr", "dask", "pyarrow", "duckdb", "numba", "prefect", "fastapi"]


@doctor_commands.command("doctor")
def doctor_command(store: StoreOption = None) -> None:
    """Report versions, processor, speeds and free disk.

    Example: `saeflow doctor`
    """
    from saeflow.store.store import store_path

    table = new_table("what", "here")
    for name, value in machine_report(store_path(store)):
        table.add_row(name, value)
    out.print_table(table)
    for problem in problems():
        out.print(problem, style="yellow")


def machine_report(store: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of the report: a name and a value."""
    import psutil
    import torch

    from saeflow.runtime.text import human_bytes
    from saeflow.store.store import local_folder

    yield "saeflow", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        yield package, installed(package)
    yield "processor", f"{processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    yield "memory", f"{human_bytes(psutil.virtual_memory().available)} free"
    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    for name in ("float32", "bfloat16"):
        yield f"{name} product", f"{product_rate(name):,.0f} GFLOP/s"
    folder = local_folder(store)
    here = next(each for each in (folder, *folder.parents) if each.exists())
    yield "disk", f"{human_bytes(shutil.disk_usage(here).free)} free for {folder}"


def problems() -> Iterator[str]:
    """Yield what would make a run fail, and the way out."""
    fastapi = installed("fastapi").split(".")
    if len(fastapi) > 1 and (int(fastapi[0]), int(fastapi[1])) >= (0, 151):
        yield 'Prefect 3.8 runs no flow with this fastapi: pip install "fastapi<0.151"'
    if installed("prefect") == "missing":
        yield "Flows need Prefect: pip install 'prefect>=3.8.8,<3.10'. The saeflow command works without."


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def product_rate(dtype: str, n: int = 1024) -> float:
    """Return the rate of an n × n matrix product of a type such as `float32` in GFLOP/s, the best of five."""
    import torch

    a, b = (torch.randn(n, n).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9
