"""Run the fuzzers: `python -m tests.fuzz --recipes 2000 --corpora 500 --stores 300 --pages 1000`."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.oracle import LIMIT_SECONDS, Case, Ground

KINDS = ("recipes", "corpora", "stores", "pages")


def case_of(kind: str) -> Case:
    from tests.fuzz import corpora, pages, recipes, stores

    return {"recipes": recipes, "corpora": corpora, "stores": stores, "pages": pages}[kind].fuzz


def work(ground: Ground) -> None:
    """Run the cases that standard input names, one a line, and answer each with one line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, seed = line.split()
        judged = []
        with ground.case() as folder:
            for each in case_of(kind)(random.Random(int(seed)), ground, folder):
                judged.append([list(each.command), each.code, each.said[-2000:], each.problems])
        answers.write(json.dumps(judged) + "\n")
        answers.flush()


class Worker:
    """A process that runs cases. It is started anew if a case ends it or takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, kind: str, seed: int) -> list[tuple[list[str], int, str, list[str]]]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "tests.fuzz", "--work"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            assert self.process.stdout
            assert self.process.stdout.readline() == "ready\n", "the worker did not start"
        process = self.process
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{kind} {seed}\n")
        process.stdin.flush()
        watch = threading.Timer(20 * LIMIT_SECONDS, process.kill)
        watch.start()
        answer = process.stdout.readline()
        watch.cancel()
        if answer:
            found: list[tuple[list[str], int, str, list[str]]] = json.loads(answer)
            return found
        return [([], -1, "", [f"the process ended with {process.wait()}"])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=f"how many {kind}")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first case")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        with tempfile.TemporaryDirectory(prefix="saeflow-fuzz-") as home:
            os.environ["HOME"] = home  # a recipe may name ~
            work(Ground.made(Path(home)))
        return 0
    worker, n_finds, codes = Worker(), 0, Counter[str]()
    for kind in KINDS:
        began = time.monotonic()
        for seed in range(asked.first, asked.first + getattr(asked, kind)):
            for command, code, said, problems in worker.run(kind, seed):
                codes[f"{kind}: {code}"] += 1
                n_finds += bool(problems)
                for problem in problems:
                    print(f"{kind} {seed}: {' '.join(command)[:300]}\n    {problem}", flush=True)
                if getattr(asked, kind) == 1:
                    print(f"{' '.join(command)[:2000]}\nexit code {code}\n{said}", flush=True)
        if getattr(asked, kind):
            print(f"{kind}: {getattr(asked, kind)} cases in {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps({"finds": n_finds, "commands": dict(codes)}))
    return int(n_finds > 0)


if __name__ == "__main__":
    sys.exit(main())
