"""Files of a corpus, tables of activations and files of labels: every format, damaged, misnamed, in odd encodings."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.oracle import Ground, Judged, judge
from tests.support.hostile_text import HOSTILE
from tests.support.small_pipeline import a_table, brought_data, recipe_data, write_recipe

TEXTS = [
    "", " ", "the cat sees the dog", HOSTILE, "\ufeffmarked", "nul\0nul", '"quoted" text', "one, two; three\tfour|five",
    "line\nline\r\nline\rline", "x" * 140_000, "1e5", "007", "NULL", "nan", "true", "2024-01-01T00:00:00Z", "👩‍👩‍👧‍👦",
    "<|endoftext|>", "\\", "'", "[1, 2]", '{"a": 1}', "é", "e\u0301",
]  # fmt: skip
NAMES = [
    "text", "key", "source", "title", "*", "", "a.b", 'a"b', "select", "KEY", "TEXT", "document_id", "filename", "é",
    HOSTILE, "x" * 300, "_saeflow_key", "column0", "token_ids", "n_tokens", "held_out", " text", "text ",
]  # fmt: skip
SQL_VALUES = [
    "1", "null", "'a'", "1.5::decimal(38,4)", "'NaN'::float", "12345678901234567890::hugeint", "true", "uuid()",
    "[1,2]", "{'x': 1, 'y': [null]}", "map {'a': 1}", "map {['k']: 1}", "'\\x00\\xff'::blob", "date '2024-01-01'",
    "date '99999-01-01'", "'infinity'::date", "'-infinity'::timestamp", "date '0044-03-15 (BC)'", "[]", "[[[]]]", "' '",
    "[date '99999-01-01']", "{'d': 'infinity'::date}", "timestamptz '2024-01-01 00:00:00+05'", "time '10:00:00'",
    "timetz '10:00:00+02'", "interval '1 month'", "'u'::enum('u','v')", "timestamp_ns '2024-01-01 00:00:00.123456789'",
    "'1010'::bit", "{'a': {'b': {'c': null}}}", "1::utinyint",
]  # fmt: skip
ENDINGS = [
    ".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".md", "", ".CSV", ".csv.gz", ".jsonl.zst", ".txt.bz2",
    ".parquet.gz", ".json.xz", ".zip", ".tar.gz", ".arrow",
]  # fmt: skip
SELECTS = [
    "select 1 as text", "select 'a' as text, 'b' as text", "from 'f*'", "select * from read_csv('f*')", "values (1)",
    "select text from 'nothing'", "select 'x' as text from range(5)", "select", ";", "select 1; select 2", "",
    "copy (select 1) to 'x'", "select * from read_text('f*')", "select 'infinity'::date as d, 'a' as text",
    "select [1,2] as text", "select error('no') as text", "select 1/0 as text", "from read_json('f*')",
    "select * from (values ('a', 1)) t(text, \"*\")", "select 'a' as text order by 1", "(" * 3000 + "select 1",
]  # fmt: skip
STEMS = [
    b"f",
    b"f",
    b"f",
    b"f",
    b"f[1]",
    b"f*",
    b"f ",
    "fé".encode(),
    b"f\xe9",
    b"f\x1b[31m",
    b"f,",
    b"f'",
    b".f",
    b"f\n",
]
PATTERNS = ["f*", "f*", "f*", ".", "*", "**", "f0", "f[1]*", "[", "nothing", "f?", "./f*", "", "case/../f*"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pa.compress(content, "zstd", asbytes=True)),
}
Rows = list[dict[str, Any]]


def fuzz(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    """Read random files as a corpus, as a table of activations or as labels."""
    read = dice.choice([_corpus] * 7 + [_table] * 2 + [_labels])
    yield from read(dice, ground, folder)


def _corpus(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    ending = dice.choice(ENDINGS)
    for number in range(dice.choice([1, 1, 1, 2, 3])):
        mine = ending if dice.random() < 0.9 else dice.choice(ENDINGS)
        name = dice.choice(STEMS).decode("utf-8", "surrogateescape") + str(number) + mine
        (folder / name).write_bytes(_packed(_damaged(_content(dice, mine), dice), mine, dice))
    about: dict[str, Any] = {"files": [dice.choice([*PATTERNS, f"f0{ending}"])]}
    if dice.random() < 0.1:
        about = {"sql": dice.choice(SELECTS)}
    for name in ("text", "key", "token_ids"):
        if dice.random() < 0.08:
            about[name] = dice.choice([each for each in NAMES if "\x1b" not in each])
    about |= dice.choice([{}] * 8 + [{"dedup": True}, {"share": 0.5}])
    parts = {"part_tokens": dice.choice([5, 800])}
    data = recipe_data(ground.ingredients, tokens=parts, train={"n_tokens": 1000}) | {"corpus": about}
    recipe, place = str(write_recipe(folder / "r.toml", data)), ["--store", str(folder / "store")]
    first = judge(["tokens", recipe, *place])
    yield first
    if first.code == 0:
        form = dice.choice(["table", "csv", "json", "jsonl", "parquet"])
        yield judge([dice.choice(["tokens", "run"]), recipe, *place])
        yield judge(["ask", "documents", "-f", form, "-o", str(folder / "out"), *place])
        yield judge(["sql", "from documents", *place])


def _rows(dice: random.Random) -> Rows:
    names = ["text", *dice.sample(NAMES, dice.randrange(4))] if dice.random() < 0.9 else dice.sample(NAMES, 3)
    values: list[Any] = [*TEXTS, None, 1, 1.5, True, [1, 2], {"a": 1}, 10**30, -0.0, [], {}]
    usual = dice.random() < 0.5
    return [
        {name: f"{name} {row}" if usual else dice.choice(TEXTS if name == "text" else values) for name in names}
        for row in range(dice.choice([0, 1, 3, 20]))
    ]


def _content(dice: random.Random, ending: str) -> bytes:
    if dice.random() < 0.03:
        return dice.randbytes(dice.randrange(2000))
    rows, low = _rows(dice), ending.lower()
    if "parquet" in low:
        return _parquet(dice, rows)
    if "csv" in low or "tsv" in low:
        return _csv(rows, "\t" if "tsv" in low else dice.choice(",,,;|"), dice.choice(["\n", "\r\n"]))
    if "json" in low:
        return _json(rows, dice.random() < 0.5, "l" in low)
    return dice.choice(TEXTS).encode()


def _csv(rows: Rows, delimiter: str = ",", line_end: str = "\n") -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=line_end)
    writer.writerows([list(rows[0]) if rows else ["text"], *(list(row.values()) for row in rows)])
    return out.getvalue().encode()


def _json(rows: Rows, ascii_only: bool, lines: bool) -> bytes:
    if lines:
        return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    return json.dumps(rows, ensure_ascii=ascii_only).encode()


def _parquet(dice: random.Random, rows: Rows) -> bytes:
    names = list(rows[0] if rows else ["text"])
    given = ["'a text ' || i" if name == "text" and dice.random() < 0.8 else dice.choice(SQL_VALUES) for name in names]
    columns = ", ".join(f'{sql} as "c{place}"' for place, sql in enumerate(given))
    table = duckdb.sql(f"select {columns} from range({dice.choice([0, 1, 5])}) r(i)").to_arrow_table()
    buffer = io.BytesIO()
    try:
        pq.write_table(table.rename_columns(names), buffer)
    except pa.ArrowException:  # a type that Parquet does not have
        pq.write_table(pa.table({"text": ["a"]}), buffer)
    return buffer.getvalue()


def _damaged(content: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.5 or not content:
        return content
    place = dice.randrange(len(content))
    before, after, text = content[:place], content[place:], content.decode("utf-8", "replace")
    inserted = dice.choice([b'"', b"[", b"{", b"\\ud800", b",", b"\n", b"[" * 5000, b"\0", dice.randbytes(9)])
    odd = [b"\xef\xbb\xbf" + content, text.encode("utf-16"), text.encode("latin-1", "replace"), content * 2]
    flipped, longer = before + dice.randbytes(1) + after[1:], before + inserted + after
    return dice.choice([before, flipped, longer, longer, *odd])


def _packed(content: bytes, ending: str, dice: random.Random) -> bytes:
    pack = next((each for suffix, each in PACKERS.items() if ending.endswith(suffix)), None)
    packed = pack(content) if pack and dice.random() < 0.95 else content
    return packed[: dice.randrange(len(packed))] if pack and packed and dice.random() < 0.1 else packed


def _table(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    ending = dice.choice([".npy", ".npz", ".csv", ".parquet", ".tsv", ".zarr", "", ".safetensors"])
    path = folder / f"t{ending}"
    if ending == ".zarr":
        path.mkdir()
        (path / "zarr.json").write_bytes(_damaged(b'{"zarr_format": 3, "node_type": "group", "attributes": {}}', dice))
    else:
        path.write_bytes(_damaged(_table_content(dice, ending), dice))
    data = brought_data(path, train={"n_tokens": 1000}, sae={"n_features": 16, "k": 2})
    recipe, place = str(write_recipe(folder / "r.toml", data)), ["--store", str(folder / "store")]
    array = ["--set", f"activations.source_array={dice.choice(['a', 'b', 'n0', ''])}"] if dice.random() < 0.2 else []
    yield judge(["encode", recipe, *place, *array])
    yield judge([dice.choice(["run", "bring"]), recipe, *place, *array])


def _table_content(dice: random.Random, ending: str) -> bytes:
    buffer, whole = io.BytesIO(), a_table(60)
    kinds = ["c8", "U5", "O", "?", "i8", "M8[s]", "f2", ">f8"]
    odd = [whole[0], whole[:0], whole[:, :0], whole[None, None], whole.astype(dice.choice(kinds)), whole * 1e30]
    array: Any = dice.choice([*odd, np.asfortranarray(whole), np.float32(1)]) if dice.random() < 0.4 else whole
    if ending == ".npy":
        np.save(buffer, array, allow_pickle=True)
    elif ending == ".npz":
        np.savez(buffer, **({"a": array} | ({"b": whole} if dice.random() < 0.5 else {})))
    else:
        numbers = {f"n{i}": whole[:, i].tolist() for i in range(3)}
        other = {dice.choice([*NAMES, "__index_level_0__"]): dice.choice([list(range(60)), ["a"] * 60, [None] * 60])}
        columns = dice.choice([numbers | other, other | numbers, other])
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if ending != ".parquet":
            return _csv(rows)
        pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), buffer)
    return buffer.getvalue()


def _labels(dice: random.Random, ground: Ground, folder: Path) -> Iterator[Judged]:
    shutil.copytree(ground.store, folder / "store")
    ending = dice.choice([".csv", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".csv.zst", ".txt", ""])
    path, place = folder / f"labels{ending}", ["--store", str(folder / "store")]
    content = _damaged(_label_content(dice, ending), dice)
    path.write_bytes(_packed(content, ending, dice))
    source = dice.choice(["a", "a", "", "..", "é", "a/b", "x" * 100])
    yield judge(["label", "--import", str(path), *place, "--source", source])
    yield judge(["ask", "feature_labels", *place])
    for labels in sorted((folder / "store" / "labels").glob("*/*.csv")):
        labels.write_bytes(_damaged(labels.read_bytes(), dice))
    yield judge(["label", "3", "a name", "--source", "a", *place])
    yield judge(["label", "3", *place])


def _label_content(dice: random.Random, ending: str) -> bytes:
    features = [0, "3", 5, -1, 10**9, 10**30, "x", None, 1.5, [1], True]
    first = dice.choice(["feature_id", "feature", "index", *NAMES])
    second = dice.choice(["label", "description", "explanation"])
    rows: Rows = [
        {
            first: dice.choice(features),
            second: dice.choice([*TEXTS, 1, None, ["a"], {"a": 1}]),
            "score": dice.choice([None, 0.5, 2, -1, "x", "nan", 1e400]),
        }
        for _ in range(dice.choice([0, 1, 3]))
    ]
    if dice.random() < 0.5:
        rows = [{"feature_id": n, "label": dice.choice(TEXTS), "score": 0.5} for n in range(3)]
    if ending == ".parquet":
        return _parquet(dice, [{"feature_id": 1, "label": "a"}])
    return _json(rows, dice.random() < 0.5, dice.random() < 0.5) if "json" in ending else _csv(rows)
