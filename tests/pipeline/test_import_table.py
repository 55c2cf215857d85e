"""Activations that no model gives: people's own tables, and made ones."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from saeflow.activations.synthetic import make_table
from saeflow.activations.tables.source import load_table, open_table, source_checksum
from saeflow.activations.tables.stream import TableReader, places_in_text_order, row_name, row_names_in_text_order
from saeflow.recipe.synthetic import SyntheticConfig
from saeflow.runtime.errors import UserError

LABELS = ["猫", "happy cat", 'a "quoted", word']
VALUES = np.array([[0.5, -1.25], [3, 0], [1e-3, 1e4]], np.float32)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_a_table_with_labels_is_read_from_every_format(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        pq.write_table(pa.table({"phrase": LABELS, "n1": VALUES[:, 0], "n2": VALUES[:, 1]}), path)
    else:
        mark = "," if name == "t.csv" else "\t"
        quoted = ['"' + label.replace('"', '""') + '"' for label in LABELS]
        lines = [mark.join([label, *map(str, row)]) for label, row in zip(quoted, VALUES.tolist(), strict=True)]
        path.write_text("\n".join([mark.join(["phrase", "n1", "n2"]), *lines]) + "\n", "utf-8")
    table = load_table(str(path))
    assert table.labels == LABELS
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.values.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_an_array_is_read_in_float32_and_its_rows_are_numbered(tmp_path, dtype):
    np.save(tmp_path / "t.npy", VALUES.astype(dtype))
    table = load_table(str(tmp_path / "t.npy"))
    np.testing.assert_array_equal(table.values, VALUES.astype(dtype).astype(np.float32))
    assert table.labels == ["row 0", "row 1", "row 2"]


def test_a_table_without_a_text_column_has_numbered_rows(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2.5\n3,4\n")
    table = load_table(str(tmp_path / "t.csv"))
    assert (table.labels, table.values.tolist()) == (["row 0", "row 1"], [[1, 2.5], [3, 4]])


def test_a_folder_named_like_a_column_is_none_of_the_table(tmp_path):
    folder = tmp_path / "a=9" / "year=2024"
    folder.mkdir(parents=True)
    (folder / "t.csv").write_text("a,b\n1,2.5\n3,4\n")
    assert load_table(str(folder / "t.csv")).values.tolist() == [[1, 2.5], [3, 4]]


BITS = VALUES.astype(np.float16).astype(np.float32)
"""Values that float16 holds exactly."""
LONG = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5) / 8


def write_arrays(path, **arrays) -> None:
    """Arrays by name, in the format that the path's ending says."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, path)
    else:
        group = zarr.open_group(path, mode="w", zarr_format=2 if path.stem == "v2" else 3)
        for name, values in arrays.items():
            group.create_array(name, data=values, chunks=(max(2, len(values) // 100), *values.shape[1:]))


CONTAINERS = ["t.npz", "t.safetensors", "v2.zarr", "v3.zarr"]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("values", [VALUES, BITS.astype(np.float16), LONG], ids=["float32", "float16", "sequences"])
def test_the_only_array_of_a_file_is_read_row_by_row(tmp_path, name, values):
    write_arrays(tmp_path / name, acts=values)
    table = load_table(str(tmp_path / name))
    np.testing.assert_array_equal(table.values, values.reshape(-1, values.shape[-1]).astype(np.float32))
    assert table.labels == [f"row {i}" for i in range(len(table.values))]


@pytest.mark.parametrize("name", CONTAINERS)
def test_of_several_arrays_one_must_be_named(tmp_path, name):
    write_arrays(tmp_path / name, acts=VALUES, other=VALUES[:, :1])
    with pytest.raises(UserError, match=r"holds 2 arrays: acts, other\.\nSet activations\.source_array"):
        load_table(str(tmp_path / name))
    np.testing.assert_array_equal(load_table(str(tmp_path / name), "other").values, VALUES[:, :1])
    with pytest.raises(UserError, match=r"activations\.source_array is 'none', but .* holds: acts, other\."):
        load_table(str(tmp_path / name), "none")


@pytest.mark.parametrize("format", [2, 3])
def test_a_zarr_array_without_a_group_is_read(tmp_path, format):
    zarr.create_array(tmp_path / "t", data=LONG, chunks=(2, 3, 5), zarr_format=format)
    np.testing.assert_array_equal(load_table(str(tmp_path / "t")).values, LONG.reshape(-1, 5))


def test_bfloat16_is_read_from_safetensors_and_from_saeflows_own_arrays(tmp_path):
    values = torch.from_numpy(VALUES).bfloat16()
    save_tensors({"acts": values}, tmp_path / "t.safetensors")
    bits = zarr.create_array(
        tmp_path / "t.zarr", data=values.view(torch.uint16).numpy(), attributes={"dtype": "bfloat16"}
    )
    assert bits.dtype == np.uint16
    for name in ("t.safetensors", "t.zarr"):
        np.testing.assert_array_equal(load_table(str(tmp_path / name)).values, values.float().numpy())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_archives_may_be_packed_and_arrays_laid_out_by_columns(tmp_path, save, order):
    values = np.asarray(VALUES, order=order)
    save(tmp_path / "t.npz", values)
    np.save(tmp_path / "t.npy", values)
    for name in ("t.npz", "t.npy"):
        np.testing.assert_array_equal(load_table(str(tmp_path / name)).values, VALUES)


def test_a_column_of_lists_holds_a_row_each(tmp_path):
    pq.write_table(pa.table({"phrase": LABELS, "vector": VALUES.tolist()}), tmp_path / "t.parquet")
    table = load_table(str(tmp_path / "t.parquet"))
    np.testing.assert_array_equal(table.values, VALUES)
    assert table.labels == LABELS


def write_cache(
    folder, values=LONG, per_file=2, token_ids=True, hooks=("blocks.0.hook_mlp",), kind=pa.float32()
) -> None:
    """What SAELens 6.54's CacheActivationsRunner leaves: Arrow streams of lists [context, D], listed in state.json."""
    folder.mkdir()
    files = []
    for n, start in enumerate(range(0, len(values), per_file)):
        piece = values[start : start + per_file]
        columns = {hook: pa.array(piece.tolist(), pa.list_(pa.list_(kind))) for hook in hooks}
        if token_ids:
            ids = np.arange(start, start + len(piece))[:, None] * 10 + np.arange(values.shape[1])
            columns["token_ids"] = pa.array(ids.tolist(), pa.list_(pa.int32(), values.shape[1]))
        table = pa.table(columns)
        fields = [
            field.with_metadata({"ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
                                 "ARROW:extension:metadata": json.dumps([list(values.shape[1:]), "float32"])})
            if field.name in hooks else field
            for field in table.schema
        ]  # fmt: skip
        files.append(f"data-{n:05d}-of-00002.arrow")
        schema = pa.schema(fields)
        with pa.OSFile(str(folder / files[-1]), "wb") as out, pa.ipc.new_stream(out, schema) as stream:
            stream.write_table(pa.Table.from_arrays(table.columns, schema=schema))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (folder / "cache-0.arrow").write_bytes(b"a shuffle")


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_the_cache_of_saelens_is_read_position_by_position_with_its_token_numbers(tmp_path, kind):
    write_cache(tmp_path / "cache", kind=kind)
    table = load_table(str(tmp_path / "cache"))
    np.testing.assert_array_equal(table.values, LONG.reshape(-1, 5))
    assert table.labels == [f"token {10 * s + t}" for s in range(3) for t in range(4)]


def test_an_older_cache_without_token_numbers_has_numbered_rows_and_one_of_several_hooks_is_named(tmp_path):
    write_cache(tmp_path / "cache", token_ids=False, hooks=("a", "b"))
    with pytest.raises(UserError, match="holds 2 arrays: a, b"):
        load_table(str(tmp_path / "cache"))
    assert load_table(str(tmp_path / "cache"), "b").labels[:2] == ["row 0", "row 1"]


def every_format(folder):
    """The same 12 rows in every format."""
    values = LONG.reshape(-1, 5)
    np.save(folder / "t.npy", values)
    for name in CONTAINERS:
        write_arrays(folder / name, acts=LONG)
    columns = {f"n{i}": column for i, column in enumerate(values.T)}
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=5)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in values.tolist())]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    write_cache(folder / "cache")
    return ["t.npy", *CONTAINERS, "t.parquet", "t.csv", "cache"]


def test_every_format_gives_the_same_rows_wherever_reading_begins_and_however_small_the_blocks(tmp_path):
    values = LONG.reshape(-1, 5)
    for block_bytes in (1, 60, 1 << 20):
        for name in every_format(tmp_path) if block_bytes == 1 else [p.name for p in tmp_path.iterdir()]:
            reader = TableReader(open_table(str(tmp_path / name), block_bytes=block_bytes))
            for start, stop in [(0, 12), (5, 7), (7, 12), (3, 4), (11, 12)]:
                found = np.concatenate([each for each, _ in reader.read(start, stop)])
                np.testing.assert_array_equal(found, values[start:stop], err_msg=f"{name}, {block_bytes}")


@settings(deadline=None)
@given(n_rows=st.integers(1, 1300))
def test_names_of_rows_are_placed_in_text_order(n_rows):
    names = [row_name(i) for i in range(n_rows)]
    assert list(row_names_in_text_order(n_rows, batch=100)) == sorted(names)
    assert [sorted(names)[place] for place in places_in_text_order(np.arange(n_rows), n_rows)] == names


BIG = """
import sys
from pathlib import Path
from saeflow.pipeline.foreign import import_table
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.memory import peak_bytes  # ru_maxrss would begin with that of the parent
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
data = {"name": "big", "activations": {"source": sys.argv[1], "part_rows": 400_000}, "threads": 1}
before = peak_bytes()
import_table.run(Lineage(Store.create(sys.argv[2]), parse_recipe(data)), Progress(verbosity=-1))
print((peak_bytes() - before) / (1 << 20))
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["t.npy", "t.npz", "t.safetensors", "t.zarr"])
def test_a_file_of_400_mb_is_brought_in_less_than_150_mib_of_memory(tmp_path, name):
    path = tmp_path / name
    values = np.broadcast_to(np.arange(1000, dtype=np.float16), (200_000, 1000))
    if name == "t.npy":
        np.save(path, values)
    else:
        write_arrays(path, acts=np.ascontiguousarray(values))
    run = subprocess.run(
        [sys.executable, "-c", BIG, path, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 150


def write(path, content) -> None:
    if isinstance(content, dict):
        path.mkdir()
        for name, each in content.items():
            (path / name).mkdir() if each is None else (path / name).write_bytes(each)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.npy", np.zeros(3), r"t\.npy has shape \(3,\), but it must be a table of rows × neurons"),
        ("t.npy", np.zeros((0, 3)), r"has shape \(0, 3\)"),
        ("t.npy", np.array([["a", "b"]]), r"activations\.source: t\.npy is not an array of numbers"),
        ("t.npy", np.array([[None, {}]]), r"activations\.source: t\.npy is not an array of numbers"),
        ("t.npy", b"not an array", r"activations\.source: t\.npy is not an array of numbers"),
        ("t.csv", b"name,kind\na,b\nc,d\n", r"t\.csv has no numeric column; it has name, kind"),
        ("t.parquet", b"not a parquet file", r"activations\.source: t\.parquet cannot be read: "),
        ("t.xlsx", b"", r"t\.xlsx, but \.xlsx is none of \.csv \.tsv \.parquet \.npy \.npz"),
        ("t.npz", b"not an archive", r"t\.npz is not an array of numbers in npz format"),
        ("t.safetensors", b"nothing", r"t\.safetensors is not an array of numbers in safetensors format"),
        ("folder", {"a.txt": b""}, r"the folder folder is neither Zarr .* nor what SAELens"),
        ("cache", {".tmp_shards": None}, r"cache is an activation cache that SAELens did not finish"),
        ("cache", {"state.json": b"{"}, r"cache/state\.json cannot be read"),
        ("cache", {"state.json": b'{"_data_files": [{"filename": "d.arrow"}]}'}, r"cache lacks d\.arrow"),
        ("t.zarr", {"zarr.json": b"{}"}, r"t\.zarr holds 0 arrays"),
        ("table", b"", r"table, but no ending is none of"),
    ],
)
def test_a_table_that_is_none_is_said_in_one_message(tmp_path, name, content, says):
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=says):
        load_table(str(tmp_path / name))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"activations\.source: no file at .*none\.csv"):
        load_table(str(tmp_path / "none.csv"))


def test_rows_that_are_cut_off_or_ragged_are_said_so(tmp_path):
    write_cache(tmp_path / "cache")
    (tmp_path / "cache" / "data-00001-of-00002.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"activations\.source: cache cannot be read"):
        load_table(str(tmp_path / "cache"))
    pq.write_table(pa.table({"v": [[1.0, 2.0], [3.0]]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet cannot be read: lists have different lengths: 1 and 2"):
        load_table(str(tmp_path / "t.parquet"))


def test_the_content_of_a_folder_changes_with_any_file_of_it_but_caches_of_shuffles(tmp_path):
    write_cache(tmp_path / "cache")
    before = source_checksum(str(tmp_path / "cache"))
    (tmp_path / "cache" / "cache-1.arrow").write_bytes(b"another")
    assert source_checksum(str(tmp_path / "cache")) == before
    write_cache(tmp_path / "other", values=LONG + 1)
    assert source_checksum(str(tmp_path / "other")) != before
    assert source_checksum(str(tmp_path / "none")) is None


def sparse(**settings) -> SyntheticConfig:
    return SyntheticConfig(
        **{"kind": "sparse", "n_samples": 200, "n_neurons": 5, "n_true": 7, "n_active": 2} | settings
    )


def test_sparse_rows_are_sums_of_at_most_n_active_known_directions():
    table = make_table(sparse())
    assert table.values.shape == (200, 5)
    assert table.directions.shape == (7, 5)
    np.testing.assert_allclose(np.linalg.norm(table.directions, axis=1), 1, rtol=1e-5)
    left = np.full(200, np.inf)
    for pair in itertools.combinations(table.directions, 2):
        basis = np.stack(pair, 1)
        strengths = np.linalg.lstsq(basis, table.values.T, rcond=None)[0]
        rest = np.linalg.norm(basis @ strengths - table.values.T, axis=0)
        left = np.where((strengths > -1e-5).all(0), np.minimum(left, rest), left)
    assert left.max() < 1e-5
    assert np.linalg.norm(table.values, axis=1).max() > 0.5


def test_the_same_seed_makes_the_same_table_and_another_seed_another():
    one, same, other = (make_table(sparse(seed=seed)).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_toy_of_superposition_holds_more_directions_than_neurons():
    table = make_table(SyntheticConfig(kind="superposition", n_samples=500, n_neurons=2, n_true=6, density=0.05))
    assert table.directions.shape == (6, 2)
    assert table.values.shape[1] == 2
    assert 0 < len(table.values) <= 500
    assert (np.linalg.norm(table.directions, axis=1) > 0.5).sum() > 2
    assert len(table.labels) == len(table.values)
