import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("[a-z]*.py"))

EXPLAIN = """
import contextlib, io, json, runpy, sys, traceback

for name in sys.argv[1:]:
    shown, code = io.StringIO(), None
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            shown.write(traceback.format_exc())
    print(json.dumps([name, code, shown.getvalue()]), file=sys.stderr)
"""
"""All in one process: each would spend seconds on importing torch."""


@pytest.fixture(scope="module")
def explained() -> dict[str, tuple[int | None, str]]:
    command = [sys.executable, "-c", EXPLAIN, *BENCHMARKS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    return {name: (code, shown) for name, code, shown in map(json.loads, lines)}


@pytest.mark.long
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts_and_explains_itself_in_the_locked_environment(
    name: str, explained: dict[str, tuple[int | None, str]]
) -> None:
    code, shown = explained[name]
    assert code == 0, shown
    assert "--quick" in shown
