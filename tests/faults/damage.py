"""Random damages, and situations in which the system refuses: what repair does, and that a run makes all equal again.

`python -m tests.faults --damages 30` and `--permissions`. Nothing that cannot be made again is ever removed: after a
repair, every byte of an SAE, a label or a token that was there before is there still, in its place or in `damaged/`.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saeflow.query.labels import Label, put
from saeflow.store.artefact import Artefact
from saeflow.store.files import checksum
from saeflow.store.store import Store
from tests.faults import POINTS, Case, Runner, differences, run_command

KINDS = {
    "tokens": "tokens/*/**/*.parquet",
    "activations": "activations/*/parts/**/*",
    "SAE": "saes/*/*",
    "feature files": "features/*/parts/**/*",
    "records": "*/*/**/*.json",
    "lists of parts": "*/*/generations/*.parquet",
    "labels": "labels/*/*.csv",
    "catalog": "catalog.sql",
    "checkpoint": "tmp/*.checkpoint/restart-0/*",
}
HARMS = ("flip", "cut", "remove", "swap", "empty")
NOBODY = 65534
KEPT = ("saes", "labels", "tokens")
"""Kinds that nothing, or only a corpus that may be gone, can make again."""


def _replaced(artefact: Artefact) -> set[str]:
    """Folders of parts that readers no longer see."""
    generation = artefact.generation()
    return artefact.part_folders() - {part.folder for part in generation.parts} if generation else set()


@dataclass(frozen=True)
class Harm:
    """A damage, chosen by its number."""

    number: int

    @property
    def dice(self) -> random.Random:
        return random.Random(1_000 + self.number)

    @property
    def kind(self) -> str:
        return list(KINDS)[self.number % len(KINDS)]

    @property
    def name(self) -> str:
        return f"damage {self.number}: {HARMS[self.number % len(HARMS)]} in {self.kind}"

    def strike(self, store: Path) -> None:
        """Damage a file; a swap damages two."""
        dice = self.dice
        old = {each.path / "parts" / name for each in Store(store).artefacts() for name in _replaced(each)}
        paths = (path for path in store.glob(KINDS[self.kind]) if path.is_file())
        found = sorted(path for path in paths if not old & set(path.parents))  # `gc` will remove the others
        path, other = dice.choice(found), dice.choice(found)
        content = path.read_bytes()
        match HARMS[self.number % len(HARMS)]:
            case "flip" if content:
                at = dice.randrange(len(content))
                path.write_bytes(content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :])
            case "cut":
                path.write_bytes(content[: dice.randrange(max(1, len(content)))])
            case "remove":
                path.unlink()
            case "swap":
                path.write_bytes(other.read_bytes())
                other.write_bytes(content)
            case _:
                path.write_bytes(b"")


def copy_of(runner: Runner, name: str) -> Path:
    """A copy of the undisturbed store, with labels."""
    folder = runner.folder / re.sub(r"\W+", "-", name)
    shutil.copytree(runner.undisturbed, folder)
    store = Store(folder)
    put(store, store.artefacts("saes")[0].id, "own", {1: Label("one"), 2: Label("two")})
    return folder


def killed_in_training(runner: Runner, name: str) -> Path:
    """The store of a run that was killed in training, and has left a checkpoint."""
    folder = runner.folder / re.sub(r"\W+", "-", name)
    point = next(each for each in POINTS if each.when == "in the middle of a step")
    assert runner.run(folder, Case(point, "SIGKILL")) == -9
    return folder


def unlike(runner: Runner, store: Path) -> list[str]:
    """What is not as in the undisturbed store, which has no labels.

    Lists of parts are compared by what they show: a merged part that was lost takes two publications to come back.
    """
    whole, mended = (
        {
            each.id: (each.published().parts, each.published().hidden)
            for each in Store(root).artefacts()
            if each.numbers()
        }
        for root in (runner.undisturbed, store)
    )
    found = [f"shows other parts: {name}" for name in whole if whole[name] != mended.get(name)]
    aside = re.compile(r": (labels|tmp/locks/labels|.*/generations/|.*/manifest\.json)")
    return found + [each for each in differences(runner.undisturbed, store) if not aside.search(each)]


def contents(store: Path, *kinds: str) -> dict[str, str]:
    """Checksums of the files of these kinds, by what they are called."""
    files = [path for kind in kinds for path in (store / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): checksum(path) for path in files if path.name != "provenance.json"}


def lost(before: dict[str, str], store: Path) -> list[str]:
    """Files whose bytes are nowhere in the store any more, neither in their places nor in `damaged/`."""
    there = {checksum(path) for path in store.rglob("*") if path.is_file()}
    return [f"lost: {name}" for name, digest in before.items() if digest not in there and not _is_record(name)]


def _is_record(name: str) -> bool:
    """Records follow from what they describe: repair writes them again."""
    return Path(name).name in ("part.json", "manifest.json") or "/generations/" in name


def damages(runner: Runner, numbers: range, only: str = "") -> Iterator[tuple[str, list[str]]]:
    for harm in map(Harm, numbers):
        if only in harm.name:
            yield harm.name, _problems_of_damage(runner, harm)


def _problems_of_damage(runner: Runner, harm: Harm) -> list[str]:
    store = (killed_in_training if harm.kind == "checkpoint" else copy_of)(runner, harm.name)
    try:
        harm.strike(store)
        before, labels = contents(store, *KEPT), contents(store, "labels")
        verified = command(runner, store, "verify", "--full", "--repair")
        found = lost(before, store)
        again = runner.run(store)
        found += [f"{what} ended with a traceback:\n{runner.said(store)}" for what in _tracebacks(runner, store)]
        if again != 0:
            return [*found, f"verify ended with {verified}, the run with {again}:\n{runner.said(store)}"]
        found += [] if contents(store, "labels") == labels else ["labels were changed"]
        return found + unlike(runner, store)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _tracebacks(runner: Runner, store: Path) -> list[str]:
    logs = (runner.log(store), runner.log(store).with_stem(f"{store.name}-verify"))
    return [log.stem for log in logs if log.exists() and "Traceback" in log.read_text("utf-8")]


def command(
    runner: Runner, store: Path, *words: str, prepare: Callable[[], None] | None = None, log: str = "verify"
) -> int | None:
    """The exit code of `saeflow WORDS --store STORE` in a process that `prepare` has prepared."""
    path = runner.log(store).with_stem(f"{store.name}-{log}")
    arguments = [*words, "--store", str(store)]
    process = runner.context.Process(target=run_command, args=(arguments, path, prepare))
    process.start()
    return runner.finish(store, process)


def as_nobody(group: int = NOBODY) -> None:
    """Go on as a user to whom nothing belongs: the administrator may read everything."""
    os.setgroups([])
    os.setgid(group)
    os.setuid(NOBODY)


def with_few_files(n: int) -> None:
    """Let this process open a few more files than it has."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + n, 4096))


def with_failing_reads(number: int, path: str) -> None:
    """Let the system refuse to open files whose paths hold these words, as a lost server does."""

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and path in str(arguments[0]):
            raise OSError(number, os.strerror(number), str(arguments[0]))

    sys.addaudithook(refuse)


def removed_while_read(path: str) -> None:
    """Let a file go away as soon as it is about to be opened: another process has removed it."""

    def remove(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and path in str(arguments[0]) and os.path.exists(str(arguments[0])):
            os.rename(str(arguments[0]), f"{arguments[0]}.away")

    sys.addaudithook(remove)


def _modes(store: Path, pattern: str, mode: int) -> None:
    for path in store.glob(pattern):
        path.chmod(mode)


@dataclass(frozen=True)
class Situation:
    """Something that keeps a process from reading or writing, though nothing is wrong with the store."""

    name: str
    arrange: Callable[[Path], None] = lambda store: None
    prepare: Callable[[], None] | None = None
    code: int = 2

    @property
    def can_be(self) -> bool:
        """False if it is about somebody else, who cannot run saeflow: this checkout lies in a private folder."""
        is_by_another = getattr(self.prepare, "func", self.prepare) is as_nobody
        return not is_by_another or all(map(_is_open_to_all, (Path(__file__), Path(sys.executable))))


def _is_open_to_all(path: Path) -> bool:
    return all(each.stat().st_mode & 0o005 == 0o005 for each in path.absolute().parents)


WEIGHTS = "sae_weights.safetensors"
SITUATIONS = [
    Situation("an SAE of another owner", lambda s: _modes(s, f"saes/*/{WEIGHTS}", 0o600), as_nobody),
    Situation("a folder of another owner", lambda s: _modes(s, "saes/*", 0o700), as_nobody),
    Situation("the folder of a kind of another owner", lambda s: _modes(s, "features", 0o700), as_nobody),
    Situation("records of another owner", lambda s: _modes(s, "*/*/manifest.json", 0o600), as_nobody),
    Situation("a part of another owner", lambda s: _modes(s, "tokens/*/parts/000001-*", 0o700), as_nobody),
    Situation("lists of parts of another owner", lambda s: _modes(s, "*/*/generations/*", 0o600), as_nobody),
    Situation("a store that may only be read", prepare=as_nobody, code=0),
    Situation("another group may write", lambda s: _modes(s, "**/*", 0o777), partial(as_nobody, 1), 0),
    Situation("too many open files", prepare=partial(with_few_files, 2)),
    Situation("a stale handle", prepare=partial(with_failing_reads, errno.ESTALE, WEIGHTS)),
    Situation("a failing disk", prepare=partial(with_failing_reads, errno.EIO, "/activations/")),
    Situation("no answer from a server", prepare=partial(with_failing_reads, errno.ETIMEDOUT, "/tokens/")),
]
"""The last three name files by their paths, and are refused where Python opens them."""


def permissions(runner: Runner, only: str = "") -> Iterator[tuple[str, list[str]]]:
    for each in SITUATIONS:
        if only in each.name and each.can_be:
            yield each.name, problems_of_situation(runner, each)


def problems_of_situation(runner: Runner, situation: Situation) -> list[str]:
    store = copy_of(runner, situation.name)
    try:
        for path in (runner.folder, *runner.folder.parents):
            if len(path.parts) > 2 and path.stat().st_uid == os.geteuid():  # not /tmp itself
                path.chmod(path.stat().st_mode | 0o055)
        before = contents(store, "tokens", "activations", "saes", "features", "labels")
        situation.arrange(store)
        code = command(runner, store, "verify", "--full", "--repair", prepare=situation.prepare)
        log = runner.log(store).with_stem(f"{store.name}-verify").read_text("utf-8")
        found = ["a traceback:\n" + log] if "Traceback" in log else []
        found += [f"exit code {code} instead of {situation.code}:\n{log}"] if code != situation.code else []
        after = contents(store, "tokens", "activations", "saes", "features", "labels")
        found += [f"changed by repair: {name}\n{log}" for name in before if before[name] != after.get(name)]
        found += [f"moved aside:\n{log}"] if (store / "damaged").exists() else []
        for path in (store, *store.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        again = command(runner, store, "verify", "--full", log="again")
        found += [f"verify afterwards ended with {again}"] if again else []
        return found + unlike(runner, store)
    finally:
        shutil.rmtree(store, ignore_errors=True)
