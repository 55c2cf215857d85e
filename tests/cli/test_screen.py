"""Answers and lists on terminals of any width: contexts shaded by value, and no name broken in two."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from saeflow.cli.answers.render import write_answer
from saeflow.cli.answers.screen import render_table
from saeflow.cli.common import out
from saeflow.cli.store import state_in_words
from saeflow.cli.summary import print_sweep
from saeflow.runtime.terminal import Terminal
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.hostile_text import ACTS, HOSTILE
from tests.support.small_pipeline import Ingredients

WIDTHS = [40, 60, 80, 200]
SHADE = re.compile(r"\x1b\[(?:1;)?38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m([^\x1b]*)\x1b")


def shown(table: pa.Table, width: int, in_colour: bool = False) -> str:
    out = io.StringIO()
    how: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "no_color": False} if in_colour else {}
    render_table(table, Terminal(file=out, width=width, **how))
    return out.getvalue()


def an_answer(*rows: tuple[int, list[str], list[float]], **more: Any) -> pa.Table:
    """An answer with the columns of `contexts`."""
    places, pieces, values = zip(*rows, strict=True)
    n = len(rows)
    return pa.table(
        {"token_id": [3_368_099 + i for i in range(n)], "value": [v[p - 1] for p, _, v in rows], "place": places,
         "pieces": pieces, "feature_values": values, "key": ["kjv/ezekiel"] * n, "source": ["kjv"] * n,
         "position": [163] * n} | more
    )  # fmt: skip


WORDS = [" that", " had", " escaped", " out", " of", " Jerusalem", " came", " unto", " me", ",", " the", " city"]
FIRES = [0, 0, 0.01, 0, 0, 0.8809, 0, 0, 0, 0, 0, 0.31]
JERUSALEM = an_answer((6, WORDS, FIRES), (2, [" in", " Jerusalem", "."], [0, 0.25, 0]))
SIGNED = an_answer((2, [" not", " bad", " at", " all"], [0.5, -1.0, 0, 0.02]))


def test_without_colours_the_token_is_in_brackets_with_its_value_and_so_are_others_that_fire() -> None:
    for text in (shown(JERUSALEM, 200), shown(JERUSALEM, 200, in_colour=False)):
        assert "that had escaped out of [Jerusalem 0.8809] came unto me, the [city 0.31]" in text
        assert "in [Jerusalem 0.25]." in text
        assert "\x1b" not in text


def test_in_colour_a_token_is_the_more_saturated_the_stronger_it_fires() -> None:
    text = shown(JERUSALEM, 200, in_colour=True)
    shades = {word: int(red) - int(blue) for red, _, blue, word in SHADE.findall(text)}
    assert list(shades) == ["escaped", "Jerusalem", "city"]
    assert shades["escaped"] < shades["city"] < 255
    strongest = [int(red) - int(blue) for red, _, blue, word in SHADE.findall(text) if word == "Jerusalem"]
    assert strongest[0] == 255 > strongest[1]
    assert "[Jerusalem" not in text


def test_values_below_zero_have_another_hue_and_a_sign() -> None:
    assert "[not +0.5] [bad -1] at all" in shown(SIGNED, 200)
    hues = {word: int(red) - int(blue) for red, _, blue, word in SHADE.findall(shown(SIGNED, 200, in_colour=True))}
    assert hues["-bad"] < 0 < hues["+not"]


def test_a_terminal_that_wants_no_colours_gets_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    render_table(JERUSALEM, Terminal(file=out, width=100, force_terminal=True, color_system="truecolor"))
    assert "[Jerusalem 0.8809]" in out.getvalue()
    assert "48;2" not in out.getvalue()


def test_a_token_where_the_feature_is_silent_stands_in_the_middle_and_says_0() -> None:
    assert "the [word 0] and [again 0.5]" in shown(
        an_answer((2, ["the", " word", " and", " again"], [0, 0, 0, 0.5])), 200
    )


def test_without_a_place_the_strongest_token_is_in_the_middle() -> None:
    table = JERUSALEM.drop_columns(["place", "value"])
    assert "[Jerusalem 0.8809]" in shown(table, 100)


def test_a_space_and_an_accent_that_fire_alone_are_visible() -> None:
    text = shown(an_answer((1, [" ", "e", "\u0301"], [1.0, 0, 0.5])), 100)
    assert "[␣ 1]e[◌\u0301 0.5]" in text


texts = st.text(st.sampled_from("ab [«»]\n\t\x1b\x00\u202e日本語\u0301👩\u200d\ufe0f∞"), max_size=12)
rows = st.lists(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(
            st.integers(1, n),
            st.lists(texts, min_size=n, max_size=n),
            st.lists(st.sampled_from([0, 0.5, -0.25, 3.0]), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=4,
)


@given(rows=rows, width=st.integers(30, 120), in_colour=st.booleans())
@example(rows=[(1, [HOSTILE, "x" * 500], [1.0, 0.5])], width=60, in_colour=False)
def test_a_context_is_one_line_inside_the_terminal_whatever_its_letters(rows: Any, width: int, in_colour: bool) -> None:
    table = an_answer(*rows)
    text = shown(table, width, in_colour)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert not ACTS.search(plain.replace("\n", ""))
    body = plain.split("─\n")[-1].split("\n\n")[0].rstrip("\n").split("\n")
    assert len(body) == len(rows)
    assert all(cell_len(line) <= width for line in body)


def test_tokens_stand_one_below_the_other_also_behind_double_width_letters() -> None:
    table = an_answer((3, [" 日本", "語の", " here", " x"], [0, 0, 1, 0]), (2, ["e\u0301t", " here"], [0, 1]))
    for width in (60, 80, 200):
        lines = [line for line in shown(table, width).splitlines() if "[here" in line]
        assert len({cell_len(line.partition("[here")[0]) for line in lines}) == 1


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["value", "context"]),
        (60, ["value", "context", "key"]),
        (80, ["value", "context", "key", "source"]),
        (120, ["token_id", "value", "context", "key", "source", "position"]),
    ],
)
def test_a_narrow_terminal_shows_the_columns_that_matter_and_names_the_others(width: int, columns: list[str]) -> None:
    words = [f" w{i}" for i in range(60)]
    text = shown(an_answer((30, words, [0.0] * 29 + [1.0] + [0.0] * 30)), width)
    header = next(line for line in text.splitlines() if "value" in line)
    assert header.split() == columns
    others = {"token_id", "value", "context", "key", "source", "position"} - set(columns)
    assert ("No room for" in text) == bool(others)
    assert all(name in text.partition("No room for")[2] for name in others)


def test_long_documents_and_long_tokens_are_drawn_at_once() -> None:
    many = an_answer((500_000, ["\u0301x"] * 1_000_000, [1.0] * 1_000_000), (1, ["日\u0301" * 500_000], [1.0]))
    assert max(map(cell_len, shown(many, 80).splitlines())) <= 80


def test_lists_that_are_no_tokens_are_shown_as_they_are() -> None:
    assert '["a"]' in shown(pa.table({"pieces": [["a"]], "feature_values": [[1.0, 2.0]]}), 80)
    assert "No rows" in shown(JERUSALEM.slice(0, 0), 80)


def test_a_file_holds_brackets_as_a_table_and_lists_otherwise(tmp_path: Path) -> None:
    write_answer(JERUSALEM, "table", tmp_path / "a.txt")
    assert "of [Jerusalem 0.8809] came" in (tmp_path / "a.txt").read_text()
    write_answer(JERUSALEM, "json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == JERUSALEM.to_pylist()


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> Iterator[int]:
    """A terminal of this width. Where COLUMNS was set when the tests began, a later value would change nothing."""
    before = out.size
    out.width = request.param
    yield request.param
    out.size = before


def words_of(text: str) -> set[str]:
    return {word.rstrip(",") for word in text.split()}


def test_ls_fits_and_every_id_can_be_copied(width: int, saeflow: Command, finished: Finished) -> None:
    said = saeflow("ls", "--store", finished.store.root).out
    artefacts = finished.store.artefacts()
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(artefacts)]] == [each.id for each in artefacts]
    assert max(map(len, lines)) <= max(width, 80)
    assert ("No room for" in said) == (width < 200)
    cells = [
        dict(zip(("generation", "parts", "tokens", "size"), state_in_words(each), strict=True)) for each in artefacts
    ]
    for column in set(lines[0].split()) - {"artefact", "inputs"}:
        assert all(each[column] in line for each, line in zip(cells, lines[1:], strict=False)), "a cell is cut"
    if width == 200:
        assert {each for artefact in artefacts for each in artefact.record.inputs} <= words_of(said)


def test_no_table_of_the_command_breaks_a_name(
    width: int, saeflow: Command, finished: Finished, ingredients: Ingredients
) -> None:
    at = ("--store", finished.store.root)
    (features,) = finished.store.artefacts("features")
    whole = {*features.record.inputs, features.id, str(features.path)}
    assert whole <= words_of(saeflow("show", "small", *at).out)
    assert "transformer.h.1.mlp.act" in words_of(saeflow("sites", ingredients.model).out)
    assert {features.name, features.fp} <= words_of(saeflow("ask", "runs", *at).out)
    keys = json.loads(saeflow("ask", "documents", "-f", "json", *at).out)
    assert {row["key"] for row in keys[:9]} <= words_of(saeflow("ask", "documents", "-n", 9, *at).out)
    assert str(finished.store.root) in words_of(saeflow("doctor", *at).out)


def test_the_table_of_a_sweep_keeps_names_and_the_numbers_that_matter(
    width: int, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    name = "demo_sweep_matryoshka_k16_l1_weight1p5"
    row = {"member": name, "architecture": "matryoshka", "sparsity": "k=16", "n_features": 4096, "l0": 16.1,
           "variance_unexplained": 0.0612, "silent": 3, "on_front": True,
           "n_tokens": 9, "judged_on": "texts"}  # fmt: skip
    print_sweep({"saes": [row]}, Path("sweep.toml"), finished.store)
    said = capsys.readouterr().out
    assert {name, "0.0612"} <= words_of(said)
    assert said.splitlines()[1].startswith(name)
