"""A finished store with bytes flipped, records edited, and files removed, added, swapped, linked or made unreadable."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from tests.fuzz.oracle import Ground, Judged, judge
from tests.support.hostile_text import HOSTILE
from tests.support.small_pipeline import recipe_data, write_recipe

VALUES: list[Any] = [
    None, 0, 1, -1, 3, 10**6, 10**19, 10**30, 0.5, -0.5, 1e308, "", "a", HOSTILE, "../..", "/etc/passwd", "\0",
    "tokens/x-00000000", [], [1], ["a"], [[]], {}, {"a": 1}, True, False, "9" * 300, "select 1", "'; drop table x; --",
]  # fmt: skip


def fuzz(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    """Damage a store in one to three places, and run a few commands on it."""
    store = folder / "store"
    shutil.copytree(ground.store, store)
    for _ in range(dice.choice([1, 1, 2, 3])):
        _damage(store, dice)
    recipe = str(write_recipe(folder / "r.toml", recipe_data(ground.ingredients)))
    short = recipe_data(ground.ingredients, sae={"k": 2}, train={"n_tokens": 1000})
    other = str(write_recipe(folder / "o.toml", short))
    commands: list[list[str]] = [
        *([each] for each in ("ls", "verify", "gc", "catalog", "upgrade")),
        *([each, recipe] for each in ("encode", "train", "run", "collect", "tokens", "evaluate", "report", "compact")),
        ["ask", "runs"],
        ["ask", "feature_summary", "-n", "5"],
        ["ask", "top_tokens", "3"],
        ["ask", "documents", "-n", "3"],
        ["ask", "sources"],
        ["ask", "search_token", "cat"],
        ["sql", "select count(*) from tokens"],
        ["sql", "--script"],
        ["show", "small"],
        ["verify", "--full"],
        ["verify", "--full", "--repair"],
        ["gc", "--yes", "--grace", "0"],
        ["train", other],
        ["run", recipe, "--set", "tokens.part_tokens=400"],
        ["label", "3"],
        ["label", "3", "name"],
        ["forget", "tales/000"],
    ]
    for command in dice.sample(commands, dice.choice([2, 3, 4])):
        yield judge([*command, "--store", str(store)])


def _damage(store: Path, dice: random.Random) -> None:
    found = (path for path in store.rglob("*") if path.is_file() and not path.is_symlink())
    files = sorted(path for path in found if "locks" not in path.parts)
    path = dice.choice(files)
    records = [each for each in files if each.suffix == ".json"]
    match dice.randrange(14):
        case 0 | 1 | 2 if path.stat().st_size:
            content = bytearray(path.read_bytes())
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
        case 3:
            path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size + 1)])
        case 4:
            path.unlink()
        case 5:
            path.write_bytes(dice.choice(files).read_bytes())
        case 6:
            path.unlink()
            path.symlink_to(dice.choice([str(dice.choice(files)), "/dev/null", "/nowhere", path.name]))
        case 7:
            path.unlink()
            path.mkdir()
        case 8:
            odd = ["9abc.parquet", "9999999999999999999999.parquet", ".hidden", "x" * 200, HOSTILE.replace("/", "")]
            name = dice.choice([path.name + "x", *odd])
            (path.parent / name).write_bytes(dice.randbytes(9))
        case 9:
            shutil.rmtree(dice.choice([each for each in store.rglob("*") if each.is_dir()]))
        case 10 | 11 | 12 | 13:
            _edit(dice.choice(records), dice)
        case _:
            os.utime(path, (0, 0))


def _edit(path: Path, dice: random.Random) -> None:
    """Change a value of a record, mostly with a right checksum."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError:
        return
    if not isinstance(record, dict):
        path.write_text(json.dumps(dice.choice(VALUES)))
        return
    has_sum = record.pop("sum", None) is not None
    inside: Any = record
    while isinstance(inside, dict) and inside:
        key = dice.choice(sorted(inside))
        if isinstance(inside[key], dict) and inside[key] and dice.random() < 0.7:
            inside = inside[key]
            continue
        if dice.random() < 0.15:
            del inside[key]
        elif isinstance(inside[key], list) and inside[key] and dice.random() < 0.5:
            inside[key][0] = dice.choice(VALUES)
        else:
            inside[key] = dice.choice(VALUES)
        break
    text = _text(record)
    if has_sum and dice.random() < 0.8:
        text = _text(record | {"sum": xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))})
    path.write_text(text if dice.random() < 0.95 else "[" * 100_000, "utf-8")


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
