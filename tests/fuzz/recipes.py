"""Recipes with settings of every kind and values of every kind, by TOML and by --set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from pydantic import BaseModel

from saeflow.cli.common import read_recipe
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.section import section_of
from tests.fuzz.oracle import Ground, Judged, judge
from tests.support.hostile_text import HOSTILE
from tests.support.small_pipeline import brought_data, recipe_data, write_recipe

VALUES = [
    "0", "1", "2", "-1", "3", "7", "64", "65", "1000000000000", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "1" + "0" * 40, "9" * 5000, "0.0", "0.5", "1.0", "-0.5", "1e-320", "1e308", "nan",
    "inf", "-inf", "true", "false", '""', '" "', '"a"', '"0"', '"1"', '"-1"', '"nan"', '"1GiB"', '"1e400GiB"',
    '"-1MiB"', '"1KiB"', '"\\u0000"', '"a\\u0000b"', '"é\\u202Eß"', '".."', '"/dev/null"', '"*"', '"**"',
    '"[!"', '"[a"', '"~"', '"~nobody/x"', '"~/x"', '"http://127.0.0.1:1/x"', '"s3://"', '"hf://datasets/"',
    '"file://x"', '"://"', '"' + "x" * 5000 + '"', '"a/' + "y" * 300 + '"', '"select 1"', '"select 1 as text"',
    '"select"', '";"', "[]", "[[]]", "[1]", "[-1]", "[0]", '["a"]', '[""]', "[1, 2, 3]", "[true]", "[nan]",
    '[{}]', "{}", "{a = 1}", "{a = {b = {c = 1}}}", "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "0x10",
    "0b1", "1_000", "[" * 100 + "]" * 100, "[" * 100_000, "{a=" * 200 + "1" + "}" * 200, "'''\n\n'''", '"cuda"',
    '"cpu"', '"auto"', '"cuda:99"', '"meta"', '"mps"', '"topk"', '"relu"', '"gated"', '"jumprelu"',
    '"matryoshka"', '"float16"', '"bfloat16"', '"15m"', '"* * * * *"', '"*/5 * * * *"', '"99999d"', '"never"',
    '"Europe/Berlin"', '"isolated"', '"zstd"', '"tcp://127.0.0.1:1"',
]  # fmt: skip
USUAL = [
    "0", "1", "2", "3", "4", "7", "64", "0.0", "0.1", "0.5", "1.0", "true", "false", "[]", "[1]", "[0.5]", '"auto"',
    '"1MiB"', '"zero"', '"fixed"', '"linear"', '"cosine"', '"tanh"', '"topk"', '"relu"', '"gated"', '"jumprelu"',
]  # fmt: skip
"""Values that many settings may have."""
ODD_KEYS = [
    "", "a", "sae.k.x", "sae..k", ".", "name.x", "corpus.files.0", "sweep.grid.sae.k", "sweep.grid", "sweep.each", "é",
    '"', "x" * 2000, "activations.synthetic.kind", "cluster", "corpus", "model", "sae", "[", "a b",
]  # fmt: skip
_BUDGETS = {
    "train.n_tokens": 20_000, "train.restarts": 3, "feed.batch_rows": 1 << 20, "sae.n_features": 4096,
    "activations.forward_batch": 4096, "tokens.context_length": 1000,
}  # fmt: skip
"""A recipe that asks for more may run for long, and is no find. Only light commands read it."""
_MOST_SAMPLES = 5000


def settings() -> list[str]:
    """Every setting of a recipe by its dotted name."""
    return sorted(_names(Recipe, ""))


def _names(section: type[BaseModel], before: str) -> Iterator[str]:
    for name, about in section.model_fields.items():
        inner = section_of(about.annotation)
        yield before + name
        if inner is not None:
            yield from _names(inner, f"{before}{name}.")


def fuzz(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    """Change a few settings of a recipe that works, and run a command on it."""
    names = settings()
    lines, changes = _base(dice, ground, folder).read_text("utf-8"), []
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3, 5])):
        name = dice.choice(names) if dice.random() < 0.9 else dice.choice(ODD_KEYS)
        value = dice.choice(VALUES if dice.random() < 0.6 else USUAL)
        if dice.random() < 0.3:
            lines = _in_toml(lines, name, value, dice)
        elif len(value) < 20_000:
            changes += ["--set", f"{name}={value}"]
        else:
            lines = f"name = {value}\n{lines}"
    content = lines.encode("utf-8", "surrogatepass")
    if dice.random() < 0.1:
        content = _damaged(content, dice)
    (folder / "r.toml").write_bytes(content)
    command = _command(dice, folder / "r.toml", changes)
    yield judge([*command, str(folder / "r.toml"), "--store", str(folder / "store"), *changes])


def _base(dice: random.Random, ground: Ground, folder: Path) -> Path:
    kind = dice.choice(["sparse", "superposed"])
    made = {"synthetic": {"kind": kind, "n_samples": 500, "n_true": 200, "n_neurons": 8}}
    table = brought_data(ground.table, train={"n_tokens": 3000})
    data = dice.choice(
        [
            table,
            table,
            recipe_data(ground.ingredients, train={"n_tokens": 3000}),
            table | {"activations": made},
            table | {"sweep": {"grid": {"sae.k": [2, 4]}}},
        ]
    )
    return write_recipe(folder / "base.toml", data)


def _in_toml(lines: str, name: str, value: str, dice: random.Random) -> str:
    """Put a setting into the text: in its section, at the top with its dotted name, or at the end."""
    section, _, key = name.rpartition(".")
    place = f"[{section}]\n"
    if section and place in lines and dice.random() < 0.7:
        old = [line for line in lines.split("\n") if line.startswith(f"{key} = ")]
        lines = lines.replace(f"{old[0]}\n", "") if old else lines
        return lines.replace(place, f"{place}{key} = {value}\n")
    return f"{name} = {value}\n{lines}" if dice.random() < 0.7 else f"{lines}\n{name} = {value}\n"


def _damaged(content: bytes, dice: random.Random) -> bytes:
    match dice.randrange(7):
        case 0:
            return b"\xef\xbb\xbf" + content
        case 1:
            return content.decode("utf-8", "replace").encode("utf-16")
        case 2:
            return content[: dice.randrange(len(content))]
        case 3:
            return content.replace(b"\n", b"\r\n")
        case 4:
            return content + HOSTILE.encode("utf-8")
        case 5:
            return dice.randbytes(dice.randrange(300))
    place = dice.randrange(len(content))
    return content[:place] + dice.randbytes(3) + content[place + 1 :]


def _command(dice: random.Random, recipe: Path, changes: list[str]) -> list[str]:
    """Return a command that ends soon: one that trains only if the recipe asks for little."""
    light = ["encode", "evaluate", "report", "compact"]
    heavy = ["run", "run", "run", "run", "bring", "tokens", "train", "synth"]
    return [dice.choice(heavy if dice.random() < 0.85 and _is_small(recipe, changes) else light), "-q"]


def _is_small(path: Path, changes: list[str]) -> bool:
    """True if running the recipe takes seconds, or if it cannot be read at all."""
    try:
        recipe = read_recipe(path, changes[1::2])
    except Exception:  # the command is to say what is wrong
        return True
    made, members = recipe.activations.synthetic, recipe.members()
    if made and max(made.n_samples, made.n_true, made.n_neurons, made.n_active) > _MOST_SAMPLES:
        return False
    if recipe.overlap == "wait" or recipe.cluster is not None or len(members) > 8:
        return False
    return all(attrgetter(name)(each) <= most for each in members for name, most in _BUDGETS.items())
