"""Activations in CSV and Parquet tables: every row and every neuron counts, or the table is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeflow.activations.tables.source import check_rows, load_table, open_table
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "values", "labels"),
    [
        ("0,1,2\n0.5,0.25,1\n1,2,3\n", [[0.5, 0.25, 1], [1, 2, 3]], None),
        (",0,1\n0,0.5,0.25\n1,1,2\n", [[0.5, 0.25], [1, 2]], None),
        (",,0,1\n0,0,0.5,0.25\n0,1,1,2\n", [[0.5, 0.25], [1, 2]], None),
        ("0.5,0.25,1\n1,2,3\n", [[0.5, 0.25, 1], [1, 2, 3]], None),
        ('"","V1","V2"\n"1",0.5,+1e2\n"2",2, 3\n', [[0.5, 100], [2, 3]], None),
        ("token,0,1\n a,0.5,1\n#b,1,2\n", [[0.5, 1], [1, 2]], [" a", "#b"]),
        ("token,1,2\na,0.5,1\nb,1,2\n", [[0.5, 1], [1, 2]], ["a", "b"]),
        ('token,y\n"a\nb",2\n"c,d",3\n"""",4\n', [[2], [3], [4]], ["a\nb", "c,d", '"']),
        ("token,y\n,2\nNULL,3\na,4\n", [[2], [3], [4]], ["", "NULL", "a"]),
        ("x,y,\n1,2,\n3,4,\n", [[1, 2], [3, 4]], None),
        ("x,x\n1,2\n3,4\n", [[1, 2], [3, 4]], None),
        ("x|y\r1|2\r3|4\r", [[1, 2], [3, 4]], None),
        ("\ufeffx;y\r\n1;2\r\n", [[1, 2]], None),
        ("x,y\n1,2\n".encode("utf-16"), [[1, 2]], None),
    ],
)
def test_every_row_and_neuron_of_a_csv_file_counts(
    tmp_path: Path, content: str | bytes, values: list[list[float]], labels: list[str] | None
) -> None:
    table = load_table(write(tmp_path, content))
    assert table.values.tolist() == values
    assert table.labels == (labels or [f"row {n}" for n in range(len(values))])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x,y\n1,2\n3,abc\n5,6\n", "has 'abc' in row 1 .* of the column 'y', in which most cells are numbers"),
        ("tok;x;y\na;0,5;1\nb;1,5;3\n", "has '0,5' in row 0 .* of the column 'x'"),
        ('x,y\n"1,000",2\n"2,000",3\n', "has '1,000' in row 0 .* of the column 'x'"),
        ("x,y\n1,2\nx,y\n3,4\n", "has 'x' in row 1 .* of the column 'x'"),
        ("cat,0.5,0.25\ndog,2,3\n", "the first line of t.csv has words and numbers: cat, 0.5, 0.25"),
        ("x,y\n1,2\n3\n4,5\n", "Row #3: Expected 2 columns, got 1"),
        ("x,y\n1,2\n3,4,5\n", "Row #3: Expected 2 columns, got 3"),
        ("", "t.csv has no numeric column"),
        (b"tok,y\ncaf\xe9,2\n", "t.csv cannot be read: .*utf-8"),
    ],
)
def test_a_csv_file_that_would_lose_a_row_or_a_neuron_is_refused(
    tmp_path: Path, content: str | bytes, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load_table(write(tmp_path, content))


@pytest.mark.parametrize("cell", ["NA", "", "nan", "inf", "1e300", "null"])
def test_a_missing_or_endless_number_is_refused_by_row_and_neuron(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, f"tok,x,y\na,0.5,1\nb,1,{cell}\n")
    with pytest.raises(UserError, match=r"t\.csv has (nan|inf) in row 1, neuron 1"):
        check_rows(open_table(path), Progress(verbosity=-1))


def test_the_last_of_many_rows_decides_as_the_first_does(tmp_path: Path) -> None:
    rows = "1,2\n" * 30_000
    assert load_table(write(tmp_path, f"x,y\n{rows}0.5,1e5\n")).values[-1].tolist() == [0.5, 1e5]
    with pytest.raises(UserError, match="has 'abc' in row 30000"):
        load_table(write(tmp_path, f"x,y\n{rows}abc,1\n"))


@pytest.mark.parametrize("name", ["a[1].csv", "a*.csv", "a?.csv", "a b'.csv", os.fsdecode(b"caf\xe9.csv")])
def test_a_csv_file_of_any_name_is_the_one_that_is_read(tmp_path: Path, name: str) -> None:
    for other in ("a1.csv", "ab.csv"):
        write(tmp_path, "x\n7\n", other)
    assert load_table(write(tmp_path, "x\n1\n", name)).values.tolist() == [[1]]


@pytest.mark.parametrize("values", [pa.array([0.5, 1.5]), pa.array([3, 4]), pa.array([3, 4], pa.int8())])
def test_an_index_of_pandas_is_no_neuron_whatever_its_type(tmp_path: Path, values: pa.Array) -> None:
    about = {b"pandas": json.dumps({"index_columns": ["time"]}).encode()}
    pq.write_table(pa.table({"x": [1.0, 2.0], "time": values}).replace_schema_metadata(about), tmp_path / "t.parquet")
    table = open_table(str(tmp_path / "t.parquet"))
    assert (table.width, table.index) == (1, ("time",))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_a_missing_name_of_a_row_is_no_word(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"x": [1.0, 2.0], "t": pa.array(["None", None], kind)}), tmp_path / "t.parquet")
    assert load_table(str(tmp_path / "t.parquet")).labels == ["None", ""]


@pytest.mark.parametrize("dtype", [">f4", ">i2", "i1", "?", "f2", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
def test_arrays_of_any_type_and_layout_give_their_numbers(tmp_path: Path, dtype: str, order: str, name: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype, order=order)  # type: ignore[call-overload]
    (np.save if name == "t.npy" else np.savez)(tmp_path / name, values)
    assert load_table(str(tmp_path / name)).values.tolist() == [[0, 1, 1], [1, 0, 1]]
