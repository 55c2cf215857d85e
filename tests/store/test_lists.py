"""Lists of parts: opened without the records of their files, and as trustworthy as if these were read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.store import files
from saeflow.store.artefact import Artefact
from saeflow.store.lists import Layout, generation_table, read_generation
from saeflow.store.records import Damaged, FileRecord, Generation, Hidden, PartRecord
from saeflow.store.storage import folder
from saeflow.store.store import Store
from saeflow.store.verify import find_damage

HIDDEN = {1: (Hidden(document_id=7, key_hash="0f", reason="forgotten"),)}


@pytest.fixture
def artefact(tmp_path) -> Artefact:
    made = Store.create(tmp_path / "store").artefact("tokens", "small", "0123abcd")
    made.create({"context_length": 4})
    for index in range(3):
        with made.new_part(index, {"n_tokens": index}, {"tokens": f"{index:06d}-00000000"}) as inside:
            (inside / "data.bin").write_bytes(bytes(index))
            (inside / "deeper").mkdir()
            (inside / "deeper" / "more.bin").write_bytes(b"x")
    return made


def written(parts: list[PartRecord], path: Path, layout: Layout = "columns") -> Generation:
    pq.write_table(generation_table(Generation(1, tuple(parts), HIDDEN), layout), path)
    return read_generation(path, 1)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_list_says_what_was_written_into_it_also_one_of_an_earlier_saeflow(artefact, tmp_path, layout):
    parts = list(artefact.parts().values())
    found = written(parts, tmp_path / "list", layout)
    assert (found.parts, found.hidden) == (tuple(parts), HIDDEN)
    for part, as_read in zip(parts, found.parts, strict=True):
        assert (as_read.text, as_read.folder, as_read.n_bytes) == (part.text, part.folder, part.n_bytes)
        assert as_read.as_json == part.as_json
        assert as_read.names_and_sizes == part.names_and_sizes
        assert (as_read.about, as_read.files) == (part.about, part.files)
    for again in get_args(Layout):
        assert generation_table(found, again) == generation_table(Generation(1, tuple(parts), HIDDEN), again)


@pytest.mark.parametrize("changed", ["index", "counts", "inputs", "files"])
def test_parts_that_differ_in_anything_are_not_equal(artefact, tmp_path, changed):
    part = artefact.parts()[2]
    others = {"index": 3, "counts": {"n_tokens": 9}, "inputs": {}, "files": part.files[:1]}
    fields = {name: getattr(part, name) for name in others} | {changed: others[changed]}
    assert written([part], tmp_path / "list").parts[0] != PartRecord(**fields)


def spoiled(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    field = table.schema.field(column)
    values = table.column(column).to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), field, pa.array(values, field.type))


@pytest.mark.parametrize("many", [2, 3, 1000])
def test_a_record_that_is_none_is_found_by_verify_and_costs_no_other_part(artefact, many, monkeypatch):
    for module in (files, folder):
        monkeypatch.setattr(module, "MANY", many)
    artefact.publish(artefact.parts().values())
    spoilt = spoiled(pq.read_table(artefact.list_path(1)), "record", 1, '{"files": [{"name": "../x"}]}')
    pq.write_table(spoilt, artefact.list_path(1))
    artefact.show(1)
    parts = artefact.published().parts
    assert [part.counts["n_tokens"] for part in parts] == [0, 1, 2]
    with pytest.raises(Damaged, match=r"000001\.parquet is missing or damaged"):
        _ = parts[1].files
    assert [found.part.index for found in find_damage(artefact, full=False) if found.part] == [1]
    assert len(parts[2].files) == 2


FILE = '{{"files": [{{"name": {name}, "n_bytes": {size}, "checksum": ""}}]}}'


@pytest.mark.parametrize(
    "record",
    [
        "{}", "[]", "no JSON", '{"files": 1}', '{"files": [1]}', '{"files": [{"name": "x"}]}',
        *(FILE.format(name=name, size=1) for name in ('"../x"', '"/x"', '"a/../x"', "7")),
        *(FILE.format(name='"x"', size=size) for size in ("1.5", '"one"')),
    ],
)  # fmt: skip
def test_files_that_no_part_has_are_damage(artefact, tmp_path, record):
    table = generation_table(Generation(1, tuple(artefact.parts().values())))
    pq.write_table(spoiled(table, "record", 1, record), tmp_path / "list")
    parts = read_generation(tmp_path / "list", 1).parts
    with pytest.raises(Damaged, match="list is missing or damaged"):
        _ = parts[1].files
    assert parts[2].files == artefact.parts()[2].files


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("names", ["data.bin", name]) for name in ("../x", "/x", "a/../x", "", ".", "a//b", "a/.", "x\0y")),
        ("names", ["data.bin"]),
        ("sizes", [2, -1]),
        ("sizes", [2, 1, 0]),
    ],
)  # fmt: skip
def test_names_that_lead_out_and_sizes_that_are_none_are_damage_however_many_there_are(
    artefact, tmp_path, monkeypatch, column, value
):
    table = generation_table(Generation(1, tuple(artefact.parts().values())))
    (artefact.path / "parts" / "x").write_bytes(b"x")
    pq.write_table(spoiled(table, column, 1, value), tmp_path / "list")
    parts = read_generation(tmp_path / "list", 1).parts
    with pytest.raises(Damaged, match="list is missing or damaged"):
        _ = parts[1].names_and_sizes
    assert parts[2].names_and_sizes == (("data.bin", "deeper/more.bin"), [2, 1])
    monkeypatch.setattr(folder, "MANY", 1)
    assert not artefact.storage.confirmed(f"{artefact.path}/parts", parts)[1]


@pytest.mark.parametrize(
    "name", ["part_index", "n_bytes", "format_version", "counts", "inputs", "names", "sizes", "sum"]
)
def test_a_list_with_a_column_of_another_kind_is_damaged(artefact, tmp_path, name):
    table = generation_table(Generation(1, tuple(artefact.parts().values())))
    place = table.column_names.index(name)
    others = [table.set_column(place, name, pa.array(["x"] * 3)), table.set_column(place, name, pa.nulls(3))]
    for other in (*others, table.drop_columns(name)) if name != "sum" else others:
        pq.write_table(other, tmp_path / "list")
        with pytest.raises(Damaged):
            read_generation(tmp_path / "list", 1)


NAMES = st.lists(st.text("aé/.", min_size=1, max_size=4), max_size=3, unique=True)
MADE = st.builds(
    lambda index, counts, names, inputs: PartRecord(
        index, counts, [FileRecord(name, len(name), "0" * 32) for name in names], inputs
    ),
    st.integers(0, 20_000_000),
    st.dictionaries(st.sampled_from(["n_tokens", "n_values"]), st.integers(0, 1 << 60)),
    NAMES.map(lambda names: [f"x{name.replace('/', '/x')}" for name in names]),
    st.dictionaries(st.sampled_from(["tokens", "000007"]), st.text(max_size=3)),
)


@given(parts=st.lists(MADE, min_size=1, max_size=8), data=st.data())
def test_a_list_is_the_same_whether_its_parts_were_listed_before_or_are_new(parts, data, tmp_path_factory):
    """A lost list is written again from the records of parts, and must get the checksum that it had."""
    path = tmp_path_factory.mktemp("lists") / "list"
    listed = written(parts, path).parts
    assert listed == tuple(parts)
    places = data.draw(st.lists(st.sampled_from(range(len(parts))), unique=True))
    mixed = tuple(data.draw(st.sampled_from([parts[place], listed[place]])) for place in places)
    fresh = tuple(parts[place] for place in places)
    contents = [io.BytesIO(), io.BytesIO()]
    for some, content in zip((mixed, fresh), contents, strict=True):
        pq.write_table(generation_table(Generation(1, some)), content)
    assert contents[0].getvalue() == contents[1].getvalue()


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_lost_list_is_written_again_also_one_of_an_earlier_saeflow(artefact, layout):
    artefact.publish(artefact.parts().values())
    path, every = artefact.list_path(1), artefact.published().parts
    pq.write_table(generation_table(Generation(1, every), layout), path)
    artefact.show(1)
    content = path.read_bytes()
    path.unlink()
    assert artefact.recover()
    assert path.read_bytes() == content


def test_sizes_are_of_files_below_a_folder_and_not_of_what_links_lead_to(artefact, tmp_path):
    inside = artefact.part_path(artefact.parts()[2])
    (inside / "link").symlink_to(inside / "data.bin")
    (inside / "linked").symlink_to(inside / "deeper")
    (inside / "deeper" / "inner").symlink_to(inside)
    names = ["data.bin", "deeper/more.bin", "deeper", "none", "none/x", "data.bin/x", "link", "linked/more.bin"]
    found = artefact.storage.sizes(str(inside), [*names, "deeper/inner/data.bin", "deeper/inner/deeper/more.bin"])
    assert found == [2, 1, *[None] * 8]
    assert artefact.storage.sizes(f"{inside}-none", names) == [None] * len(names)
    elsewhere = tmp_path / "elsewhere"
    inside.rename(elsewhere)
    inside.symlink_to(elsewhere)
    assert artefact.storage.sizes(str(inside), names) == [None] * len(names)
    assert artefact.storage.sizes(str(inside), []) == []


def test_a_file_record_stays_as_it_was_written(artefact, tmp_path):
    part = artefact.parts()[1]
    record = FileRecord("ä/ö.bin", 3, "0" * 32)
    read = written([PartRecord(1, part.counts, [record])], tmp_path / "list").parts[0]
    assert read.files == [record]
