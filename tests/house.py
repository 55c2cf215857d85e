"""Print how the plan of the code changed between two checkouts: sizes, lookups, branches, repeated names.

python -m tests.house             this checkout alone
python -m tests.house CHECKOUT    that checkout before, this one after

The last line is JSON with the figures that were asked.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.benchmarks._bars import Bar, report
from tests.support.checkouts import entry, output

ROOT = Path(__file__).resolve().parents[1]
TRACED = ROOT / "tests" / "support" / "traced.py"
SMALL_STORE = ROOT / "tests" / "stores" / "format_2"

FAMILIES = {"artefact", "tokens_artefact", "facts", "newest"}
FLAT = {
    **dict.fromkeys(
        ("config", "fingerprints", "recipe_file", "recipe_text", "sections", "swept", "timetable"), "recipe"
    ),
    **dict.fromkeys(("cli", "command_line", "commands_run", "terminal"), "cli"),
    **dict.fromkeys(("corpus", "remote", "tables"), "corpus"),
    **dict.fromkeys(("activations", "cluster", "features", "imported", "pipeline", "seen", "train"), "pipeline"),
}
"""Layers of modules before there were packages, where they matter here; nothing lay in store/ then."""

BUCKET = {
    "objects",
    "is_url",
    "_is_url",
    "is_remote",
    "is_bucket",
    "bucket",
    "Bucket",
    "Folder",
    "Objects",
    "ObjectSlot",
}
"""Names in a condition that ask whether a store is a bucket, or whether a document's address is a URL."""


@dataclass(frozen=True)
class House:
    """One checkout."""

    root: Path

    @cache  # noqa: B019  # two objects a process
    def trees(self, *folders: str) -> dict[Path, ast.Module]:
        """Syntax of every module by its path below the root."""
        paths = [path for folder in folders for path in sorted((self.root / folder).rglob("*.py"))]
        return {path.relative_to(self.root): ast.parse(path.read_text("utf-8")) for path in paths}

    @property
    def ours(self) -> dict[Path, ast.Module]:
        return self.trees("saeflow", "flows")

    def layer(self, path: Path) -> str:
        """The package a module belongs to."""
        if (self.root / "saeflow" / "store.py").exists() and path.parts[:1] == ("saeflow",):
            return FLAT.get(path.stem, "")
        return path.parts[1] if len(path.parts) > 2 else ""

    def per_folder(self) -> Counter[str]:
        """Modules of each folder of saeflow, its `__init__` aside."""
        return Counter(str(path.parent) for path in self.trees("saeflow") if path.stem != "__init__")

    def longest_module(self) -> int:
        """Lines of the longest module, sae/kernels.py aside."""
        return max(self.n_lines(path) for path in self.ours if path.stem != "kernels")

    def longest_class(self) -> int:
        classes = (node for tree in self.ours.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        return max((node.end_lineno or 0) - node.lineno + 1 for node in classes)

    def n_lines(self, path: Path) -> int:
        return len((self.root / path).read_text("utf-8").splitlines())

    def lines(self) -> int:
        return sum(map(self.n_lines, self.ours))

    def lookups(self) -> int:
        """Places that make a Lineage, or call `F(store, recipe)`, written so, where F is one of FAMILIES."""
        calls = [n for tree in self.ours.values() for n in ast.walk(tree) if isinstance(n, ast.Call)]
        names = [ast.unparse(call.func).split(".")[-1] for call in calls]
        given = [[ast.unparse(argument) for argument in call.args] for call in calls]
        return sum(
            name == "Lineage" or (name in FAMILIES and words == ["store", "recipe"])
            for name, words in zip(names, given, strict=True)
        )

    def branches(self, documents: bool = False) -> int:
        """Places outside store/ where a condition asks: bucket or folder? In corpus/ of a document's address."""
        return sum(
            len(set(_askings(tree)))
            for path, tree in self.ours.items()
            if self.layer(path) != "store" and (self.layer(path) == "corpus") == documents
        )

    def repeated_names(self) -> list[str]:
        """Functions, classes and constants that more than one module of saeflow/ defines at its top level."""
        places = defaultdict(set)
        for path, tree in self.trees("saeflow").items():
            for name in _top_names(tree):
                places[name].add(path)
        return sorted(name for name, paths in places.items() if len(paths) > 1)

    def patched(self) -> set[tuple[str, str]]:
        """Modules of saeflow, each with the name in it that a test replaces by `monkeypatch.setattr`."""
        modules = {".".join(path.with_suffix("").parts) for path in self.trees("saeflow")}
        found = {pair for tree in self.trees("tests").values() for pair in _patches(tree)}
        return {(module, name) for module, name in found if module in modules}

    @cache  # noqa: B019
    def traced(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Pairs of files of which the first calls the second while `saeflow encode` encodes a small store, and its
        calls of F(store, recipe)."""
        with tempfile.TemporaryDirectory(prefix="saeflow-house-") as temporary:
            folder = Path(temporary) / "small"
            shutil.copytree(SMALL_STORE, folder)
            shutil.rmtree(folder / "store" / "features")
            command = [sys.executable, "-P", str(TRACED), str(self.root), *entry(self.root)]
            said = output(self.root, [*command, "encode", "small.toml", "--store", "store"], folder)
        calls, lookups = json.loads(said.splitlines()[-1])
        return calls, lookups

    def walked(self, callers: str = "") -> list[str]:
        """Files outside cli/ and recipe/ whose functions run then; `callers`: that this package calls itself."""
        called = {Path(file) for by, file in self.traced()[0] if not callers or self.layer(Path(by)) == callers}
        return sorted(
            str(path) for path in called if self.layer(path) not in ("cli", "recipe") and path.stem != "__init__"
        )


def _conditions(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield node
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Match):
            yield from (node.subject, *(case.pattern for case in node.cases))


def _askings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Places in conditions of the names in BUCKET."""
    for condition in _conditions(tree):
        for node in ast.walk(condition):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if name in BUCKET:
                yield node.lineno, node.col_offset  # type: ignore[attr-defined]


def _top_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name))
            yield from (name for name in names if name.isupper() and len(name) > 1)


def _patches(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What `monkeypatch.setattr(module, "name", ...)` and `monkeypatch.setattr("module.name", ...)` replace."""
    full_names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "monkeypatch.setattr":
            continue
        target, *rest = call.args
        if isinstance(target, ast.Constant):
            module, _, name = str(target.value).rpartition(".")
            yield module, name
        elif isinstance(rest[0], ast.Constant):
            first, _, others = ast.unparse(target).partition(".")
            yield f"{full_names.get(first, first)}.{others}".rstrip("."), str(rest[0].value)


FIGURES: list[tuple[str, Callable[[House], float], float | None]] = [
    ("modules in the fullest folder of saeflow/", lambda h: max(h.per_folder().values()), 14),
    ("longest module (lines; kernels aside)", House.longest_module, 400),
    ("longest class (lines)", House.longest_class, 200),
    (
        "places that make a Lineage or call artefact, tokens_artefact, facts, newest (store, recipe)",
        House.lookups,
        None,
    ),
    (
        "calls of functions of (store, recipe), and lineages made, while `saeflow encode` runs",
        lambda h: len(h.traced()[1]),
        3,
    ),
    ("branches on bucket or folder outside store/", House.branches, 0),
    ("branches on a document's address being a URL, in corpus/", lambda h: h.branches(documents=True), None),
    ("files outside cli/ and recipe/ whose functions `saeflow encode` runs", lambda h: len(h.walked()), 25),
    ("of these, files that pipeline/ itself calls", lambda h: len(h.walked("pipeline")), None),
    ("names in modules of saeflow that tests replace by monkeypatch.setattr", lambda h: len(h.patched()), 15),
    ("names defined at the top of several modules", lambda h: len(h.repeated_names()), 10),
    ("lines of saeflow/ and flows/", House.lines, None),
]


def details(house: House) -> dict[str, list[str]]:
    """What the figures of a checkout are made of."""
    return {
        "Modules of each folder": [f"{folder} {n}" for folder, n in house.per_folder().items()],
        "Modules above 400 lines": [str(path) for path in house.ours if house.n_lines(path) > 400],
        "Files that encode walks": house.walked(),
        "Its lookups from (store, recipe)": [f"{n} × {name}" for name, n in Counter(house.traced()[1]).items()],
        "Names defined several times": house.repeated_names(),
        "Replaced by tests": sorted(".".join(pair) for pair in house.patched()),
    }


def main() -> None:
    houses = [House(Path(argument).resolve()) for argument in sys.argv[1:]] + [House(ROOT)]
    bars = []
    for name, figure, asked in FIGURES:
        values = [figure(house) for house in houses]
        wanted = "" if asked is None else f"  (asked <= {asked})"
        print(f"{name:92} {' → '.join(f'{value:,}' for value in values)}{wanted}")
        if asked is not None:
            bars.append(Bar(name, asked, "<=", values[-1]))
    if len(houses) > 1:
        bars.append(Bar("lines fewer than before", 1, ">=", houses[0].lines() - houses[-1].lines()))
    for about, names in details(houses[-1]).items():
        print(f"\n{about}: {', '.join(names)}")
    print()
    report("house", bars)


if __name__ == "__main__":
    main()
