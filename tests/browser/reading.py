"""What a person reads in a panel, compared with the rows of its SQL. One function for each question that is drawn.

A function takes the panel and the rows that it should show, and raises AssertionError at the first difference.
"""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from saeflow.browser.shading import per_cent
from saeflow.runtime.text import brief, human_bytes, sanitise
from tests.support.html_tree import Element

Rows = Sequence[Mapping[str, Any]]
Words = Mapping[int, Mapping[str, Any]]
"""What features look like in words: rows of feature_words, by feature."""

NONE = "–"
LONGEST = 200
"""Characters of a text that a page shows."""


def number_is(seen: str, value: object) -> None:
    """A whole number is shown whole; another is correct to four digits; a missing one is a dash."""
    match value:
        case None:
            assert seen == NONE
        case bool():
            assert seen == ("yes" if value else "no")
        case int():
            assert seen.replace(",", "") == str(value)
        case float():
            digit = 10.0 ** (math.floor(math.log10(abs(value))) - 3) if value else 0.0
            assert abs(float(seen.replace(",", "")) - value) <= 0.5001 * digit, f"{seen} is not {value!r}"
        case _:
            assert seen == visible(value).strip()


def visible(text: object) -> str:
    return sanitise(brief(str(text), LONGEST))


def text_is(seen: Element, value: object, missing: str = NONE) -> None:
    assert seen.words == (missing if value is None else visible(value).strip(" ")), f"{seen.words!r} is not {value!r}"


def piece_is(seen: Element, value: str) -> None:
    """A vocabulary entry, the spaces at its ends made visible."""
    inner = seen.one(".piece").text
    begun = len(value) - len(value.lstrip(" "))
    assert not inner.startswith(" "), "a space is not visible"
    assert not inner.endswith(" "), "a space is not visible"
    assert inner.replace("␣", " ") == visible(value).replace("␣", " ")
    assert inner.startswith("␣" * min(begun, LONGEST))


def about(links: Sequence[Element]) -> tuple[list[str], dict[str, str]]:
    """The words of the path and of the query of a panel's one link."""
    assert len(links) == 1
    address = urllib.parse.urlsplit(links[0].attributes["href"])
    return address.path.split("/"), dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))


def leads_to(cell: Element, kind: str, value: object) -> None:
    assert about(cell.all("a"))[0][-2:] == [kind, str(value)]


def headings(table: Element) -> list[str]:
    return [each.words for each in table.all("thead")[0].all("th")]


def body(table: Element) -> list[list[Element]]:
    """Cells of each row, without the head."""
    heads = [id(each) for head in table.all("thead") for each in head.within()]
    lines = [each for each in table.all("tr") if id(each) not in heads]
    return [[each for each in line.children if isinstance(each, Element)] for line in lines]


def chart_rows(panel: Element) -> Rows:
    (script,) = (each for each in panel.one("figure.chart").children if isinstance(each, Element))
    found: Rows = json.loads(script.text)["datasets"]["rows"]
    return found


def chart_is(panel: Element, rows: Rows, *fields: str) -> None:
    """The picture has these columns of every row, correct to five digits."""
    drawn = chart_rows(panel)
    assert drawn[0].keys() == set(fields)
    for mine, row in zip(drawn, rows, strict=True):
        for name in fields:
            value = row[name]
            assert mine[name] == (float(f"{value:.5g}") if isinstance(value, float) else value), name


LINKED = {
    "feature_id": "features", "other_id": "features", "vocab_id": "tokens", "token_id": "tokens-at",
    "first_token_id": "tokens-at", "top_token_id": "tokens-at",
}  # fmt: skip


WORDS = {"fires on": "pieces", "pushes up": "promotes"}
"""Columns that the question feature_words gives, behind those that name a feature."""

TOLD_ONCE = {"n_entry", "n_counted"}
"""Columns that are the same in every row and stand in a sentence above the table."""


def table(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.all("table")[-1]
    titles = headings(found)
    left_out = rows[0].keys() - set(titles)
    assert [name for name in titles if name not in WORDS] == [name for name in rows[0] if name not in left_out]
    for name in left_out:
        assert name in TOLD_ONCE or (name == "label" and all(row["label"] is None for row in rows))
    for cells, row in zip(body(found), rows, strict=True):
        beside = cells[: len(cells) - len(titles)]
        for title, cell in zip(titles, cells[len(beside) :], strict=True):
            if title in WORDS:
                pieces_are(cell, words[row.get("feature_id", row.get("other_id"))][WORDS[title]])
            else:
                cell_is(cell, row, title)
        for link in beside:
            path, query = about(link.all("a"))
            numbers = {path[-2], *query.values()}
            assert {str(row[name]) for name in ("feature_id", "vocab_id") if name in row} <= numbers


def cell_is(cell: Element, row: Mapping[str, Any], name: str) -> None:
    value = row[name]
    if value is None:
        assert cell.words == NONE, name
    elif name in LINKED:
        assert cell.words == str(value), name
        leads_to(cell, LINKED[name], value)
    elif name == "piece":
        piece_is(cell, value)
        if "vocab_id" in row:
            leads_to(cell, "tokens", row["vocab_id"])
    elif name in WORDS.values():
        pieces_are(cell, value)
    elif isinstance(value, int | float):
        number_is(cell.words, value)
    else:
        text_is(cell, value)
    if name == "key" and "source" in row:
        document_is(cell, row, row.get("token_id", row.get("top_token_id")))


def pieces_are(cell: Element, values: Sequence[str]) -> None:
    for each, value in zip(cell.all(".piece"), values, strict=True):
        piece_is(Element("td", {}, [each]), value)


def entry(panel: Element, rows: Rows, words: Words) -> None:
    said = next(each.words.split() for each in panel.all("p") if each.text.startswith("The text has it"))
    n_entry, n_counted = rows[0]["n_entry"], rows[0]["n_counted"]
    number_is(said[4], n_entry)
    assert said[6] == ("all" if n_counted == n_entry else f"{n_counted:,}")
    table(panel, rows, words)


def followers(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    assert headings(found) == ["next", "n_tokens", "share", "pushed by features"]
    for cells, row in zip(body(found), rows, strict=True):
        for cell, name in zip(cells, ("piece", "n_tokens", "share"), strict=False):
            cell_is(cell, row, name)
        pushes = [f"{feature} {push:+.2f}" for feature, push in zip(row["features"], row["pushes"], strict=True)]
        assert cells[3].words.split() == " ".join(pushes).split()
        for link, feature in zip(cells[3].all("a"), row["features"], strict=True):
            leads_to(Element("td", {}, [link]), "features", feature)


def document_is(cell: Element, row: Mapping[str, Any], token_id: int | None, feature: str | None = None) -> None:
    path, query = about(cell.all("a"))
    assert path[-1] == "doc"
    assert query["key"] == row["key"]
    assert query.get("at") == (None if token_id is None else str(token_id))
    assert feature is None or query["feature"] == feature


def facts(panel: Element, rows: Rows, words: Words) -> None:
    (row,) = rows
    shown = panel.one("dl.facts").all("div")
    assert [each.one("dt").words for each in shown] == list(row)
    for each, value in zip(shown, row.values(), strict=True):
        number_is(each.one("dd").words, value)


def histogram(panel: Element, rows: Rows, words: Words) -> None:
    chart_is(panel, rows, "from_value", "to_value", "n_tokens")
    assert panel.one("p.slider").one("input").attributes["max"] == str(len(rows) - 1)
    table(panel, rows, words)


def densities(panel: Element, rows: Rows, words: Words) -> None:
    chart_is(panel, rows, "from_density", "to_density", "n_features")
    table(panel, rows, words)


def curves(panel: Element, rows: Rows, words: Words) -> None:
    chart_is(panel, rows, "n_tokens", "variance_unexplained", "l0", "dead", "lr")


def scatter(panel: Element, rows: Rows, words: Words) -> None:
    """The picture fetches its rows from the SQL link itself."""
    spec = json.loads(panel.one("figure.chart").all("script")[0].text)
    link = panel.one("a.sql").attributes["href"]
    assert spec["data"]["url"] == link.replace("?", ".json?")
    assert spec["data"]["format"]["property"] == "panels.rows.rows"


def logits(panel: Element, rows: Rows, words: Words) -> None:
    up = sorted((row for row in rows if row["logit"] > 0), key=lambda row: (-row["logit"], row["vocab_id"]))[:10]
    down = sorted((row for row in rows if row["logit"] < 0), key=lambda row: (row["logit"], -row["vocab_id"]))[:10]
    for found, title, mine in zip(panel.all("table"), ("Up", "Down"), (up, down), strict=True):
        assert found.one("caption").words == title
        cells = body(found)
        assert [about(each[0].all("a"))[0][-1] for each in cells] == [str(row["vocab_id"]) for row in mine]
        for (piece, logit), row in zip(cells, mine, strict=True):
            piece_is(piece, row["piece"])
            number_is(logit.words, row["logit"])


def neighbours(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    titles = headings(found)
    assert ["other_id", "label", *(name for name in titles[1:] if name not in WORDS)] == list(rows[0])
    for cells, row in zip(body(found), rows, strict=True):
        other, *numbers, compare = cells
        if titles[1] in WORDS:
            pieces_are(numbers.pop(0), words[row["other_id"]][WORDS[titles[1]]])
        leads_to(other, "features", row["other_id"])
        label = "" if row["label"] is None else visible(row["label"])
        assert other.words == f"{row['other_id']} {label}".strip()
        for cell, name in zip(numbers, list(row)[2:], strict=True):
            number_is(cell.words, row[name])
        assert about(compare.all("a"))[1]["b"] == str(row["other_id"])


def context(item: Element, row: Mapping[str, Any], feature: str) -> None:
    """Every token of the row in its order; a mark for each with a value and for the centre; the shades grow with it."""
    number_is(item.all("b")[0].words, row["value"])
    copies = row.get("n_copies", 1)
    assert [each.words for each in item.all("small")] == ([f"× {copies:,}"] if copies > 1 else [])
    marks, silent = [], ""
    for each in item.one("q").one("bdi").children:
        if isinstance(each, Element) and each.tag == "mark":
            marks.append((silent, each))
            silent = ""
        else:
            silent += each if isinstance(each, str) else each.text
    place, expected, before = row["place"] - 1, [], ""
    for i, (text, value) in enumerate(zip(row["pieces"], row["feature_values"], strict=True)):
        if value or i == place:
            expected.append((before, visible(text), value, i == place))
            before = ""
        else:
            before += visible(text)
    assert silent == before
    top = max(abs(value) for value in row["feature_values"])
    for (quiet, mark), (before, text, value, is_centre) in zip(marks, expected, strict=True):
        told = mark.one("i").text
        assert (quiet, mark.text.removesuffix(told)) == (before, text)
        number_is(told.strip(), value)
        assert ("c" in mark.classes) == is_centre
        assert mark.attributes["tabindex"] == "0"
        shade = f"{'v' if value > 0 else 'n'}{min(9, 1 + math.floor(9 * abs(value) / top))}" if value else ""
        assert [each for each in mark.classes if each != "c"] == ([shade] if shade else [])
    assert row["feature_values"][place] == row["value"]
    document_is(item, row, row["token_id"], feature)
    assert item.all("a")[0].text == " · ".join(visible(row[name]) for name in ("source", "key") if row[name])


def contexts(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    for item, row in zip(panel.all("li"), rows, strict=True):
        context(item, row, asked["feature"])


def bands(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    """A heading says of each band what its rows say, and its contexts follow it."""
    heads = panel.all("h4")
    lists = [each for each in panel.all("ol.contexts") if each.all("li")]
    grouped = [(band, list(some)) for band, some in groupby(rows, key=lambda row: row["band"])]
    for head, items, (band, mine) in zip(heads, lists[: len(grouped)], grouped, strict=True):
        edges, _, n_tokens = head.text.partition(":")
        low, _, high = edges.partition(" to ")
        number_is(low, mine[0]["low_value"])
        number_is(high, mine[0]["high_value"])
        assert n_tokens.split() == [f"{mine[0]['n_tokens']:,}", "tokens", "band", str(band)]
        for item, row in zip(items.all("li"), mine, strict=True):
            context(item, row, asked["feature"])


def within(cell: Element, value: object, low: object, high: object) -> None:
    """A figure, and the ends of its interval in small type if it has one."""
    told = cell.all("small")
    number_is(cell.words.removesuffix(told[0].words if told else "").strip(), value)
    assert bool(told) == (low is not None)
    if told:
        for seen, end in zip(told[0].words.split(" to "), (low, high), strict=True):
            number_is(seen, end)


TELLS = ("f1", "threshold", "precision", "recall", "lift", "q", "n_fires", "n_both")


def tells(panel: Element, rows: Rows, words: Words) -> None:
    """Classes that a feature tells, or features that tell a class."""
    found = panel.one("table")
    of_class = "feature_id" in rows[0]
    first = (["feature", "label"] + ["fires on"] * bool(words)) if of_class else ["class"]
    figures = ["AUROC", "F1", "value from", "precision", "recall", "lift", "q", "firings", "in the class"]
    assert headings(found) == first + figures
    for cells, row in zip(body(found), rows, strict=True):
        if of_class:
            leads_to(cells[0], "features", row["feature_id"])
            text_is(cells[1], row["label"])
            if words:
                pieces_are(cells[2], words[row["feature_id"]]["pieces"])
        else:
            assert about(cells[0].all("a"))[1] == {"annotation": row["annotation"], "class": row["class"]}
            assert cells[0].words == f"{visible(row['annotation'])}: {visible(row['class'])}".strip()
        within(cells[len(first)], row["auroc"], row["auroc_low"], row["auroc_high"])
        for cell, name in zip(cells[len(first) + 1 :], TELLS, strict=True):
            number_is(cell.words, row[name])


def effects(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    assert headings(found) == ["measurement", "set to", "ahead", "firings", "change of the loss", "worse", "KL"]
    for cells, row in zip(body(found), rows, strict=True):
        effect, change, ahead, firings, loss, worse, kl = cells
        text_is(effect, row["effect"])
        text_is(change, row["change"])
        number_is(ahead.words, row["ahead"])
        number_is(firings.words, row["n_firings"])
        within(loss, row["mean_loss_change"], row["loss_change_low"], row["loss_change_high"])
        assert worse.words == per_cent(row["worse_share"])
        within(kl, row["mean_kl"], row["kl_low"], row["kl_high"])


def moved(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    assert headings(found) == ["measurement", "token", "firings", "up", "down", "probability", "log", "direct"]
    for (effect, entry, *numbers), row in zip(body(found), rows, strict=True):
        text_is(effect, row["effect"])
        piece_is(entry, row["piece"])
        leads_to(entry, "tokens", row["vocab_id"])
        names = ("n_firings", "n_up", "n_down", "mean_change", "log_change", "direct_change")
        for cell, name in zip(numbers, names, strict=True):
            number_is(cell.words, row[name])


def cut_text(item: Element, row: Mapping[str, Any], feature: str) -> None:
    """A text that marks its token as «token», cut on both sides."""
    before, _, rest = row["context"].partition("«")
    token, _, after = rest.partition("»")
    inner = item.one("q").one("bdi")
    assert inner.one("mark.c").text == visible(token)
    assert inner.text == sanitise(before[-500:]) + visible(token) + sanitise(after[:500])
    document_is(Element("p", {}, item.all("a")[:1]), row, row["token_id"], feature)


def effect_contexts(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    for item, row in zip(panel.all("li"), rows, strict=True):
        number_is(item.all("b")[0].words, row["kl"])
        cut_text(item, row, asked["feature"])
        said = item.one("p.place")
        numbers = said.text.partition("More likely")[0].removeprefix(visible(row["effect"])).split()
        number_is(numbers[1], row["value"])
        number_is(numbers[4].rstrip(","), row["set_to"])
        number_is(numbers[8].removesuffix("."), row["loss_change"])
        pieces_are(said, [*row["up"], *row["down"]])


def mistakes(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    for item, row in zip(panel.all("li"), rows, strict=True):
        assert item.all("b")[0].words == ("fires" if row["asked"] else "silent")
        cut_text(item, row, asked["feature"])
        verb = "fires" if row["answered"] else "is silent"
        said = f"The rule says that it {verb}."
        if row["model"] is not None:
            said = f"By the label of {visible(row['source'])}, {visible(row['model'])} said that it {verb}: "
            said += f"{visible(row['method'])}, {visible(row['stratum'])}."
        assert item.one("p.place").words.split() == said.split()


def spans(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    """Spans of a class; the tokens that have it are marked."""
    for item, row in zip(panel.all("li"), rows, strict=True):
        inner = item.one("q").one("bdi")
        assert {each.text.strip() for each in inner.all("i")} <= {"1"}
        marked = [each.text.removesuffix(" 1") for each in inner.all("mark")]
        has = [visible(each) for each, value in zip(row["pieces"], row["feature_values"], strict=True) if value]
        assert marked == has
        assert [each.words for each in item.all("small")] == [f"{row['n_tokens']:,} tokens"] * (row["n_tokens"] > 1)
        document_is(Element("p", {}, item.all("a")), row, row["token_id"])


def chosen(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    """Each token in its text, with a link to the page without it."""
    for item, row in zip(panel.all("li"), rows, strict=True):
        inner, centre = item.one("q").one("bdi"), visible(row["pieces"][row["place"] - 1])
        assert inner.text == "".join(map(visible, row["pieces"]))
        assert inner.one("mark.c").text == centre
        assert inner.attributes["data-first"] == str(row["token_id"] - row["place"] + 1)
        token, document, without = item.all("a")
        assert token.words == str(row["token_id"])
        leads_to(Element("p", {}, [token]), "tokens-at", row["token_id"])
        document_is(Element("p", {}, [document]), row, row["token_id"])
        others = [str(other["token_id"]) for other in rows if other is not row]
        assert about([without])[1].get("tokens", "") == ",".join(others)


def examples(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    """Contexts stand under the heading of their part."""
    heading, under = "", dict[str, list[Element]]()
    for each in panel.within():
        if each.tag == "h3":
            heading = each.words.split()[0]
        if each.tag in ("h4", "ol"):
            under.setdefault(heading, []).append(each)
    parts = {"Strongest": "strongest", "From": "band", "At": "random"}
    assert {parts[each] for each in under} >= {row["part"] for row in rows}
    for title, part in parts.items():
        mine = [row for row in rows if row["part"] == part]
        section = Element("section", {}, list(under.get(title, [])))
        if part == "band":
            bands(section, mine, asked)
        else:
            contexts(section, mine, asked)


def near_misses(panel: Element, rows: Rows, asked: Mapping[str, str]) -> None:
    said = next(each for each in panel.all("p") if each.text.startswith("The feature fires on"))
    words = said.words.split()
    number_is(words[4], rows[0]["n_fired"])
    number_is(said.words.rpartition("silent on ")[2].partition(". ")[0], rows[0]["n_silent"])
    piece_is(said, rows[0]["pieces"][rows[0]["place"] - 1])
    contexts(panel, rows, asked)


def place(panel: Element, rows: Rows, words: Words) -> None:
    (row,) = rows
    inner = panel.one("q")
    parts = (row["text_before"][-1000:], row["token_text"][:1000], row["text_after"][:1000])
    assert inner.text == "".join(map(sanitise, parts))
    assert inner.one("mark.c").text == sanitise(parts[1])
    document_is(panel.one("p.flat"), row, row["token_id"])


def text(panel: Element, rows: Rows, words: Words) -> None:
    """Each token is a link to its own page, or of a text of one's own to its entry's, and says its value."""
    by = "value" if any(row["value"] is not None for row in rows) else "n_features"
    name, kind = ("token_id", "tokens-at") if "token_id" in rows[0] else ("vocab_id", "tokens")
    shades = []
    for each, row in zip(panel.one("p.text").all("a"), rows, strict=True):
        assert each.attributes.get("id", f"t{row[name]}") == f"t{row[name]}"
        leads_to(Element("p", {}, [each]), kind, row[name])
        told = each.all("i")
        assert len(told) == bool(row[by])
        if told:
            number_is(told[0].text.strip(), row[by])
            shades.append((abs(row[by]), int(each.classes[0][1:])))
        assert each.text.removesuffix(told[0].text if told else "") == visible(row["piece"])
    ordered = [shade for _, shade in sorted(shades)]
    assert ordered == sorted(ordered)


def features(panel: Element, rows: Rows, words: Words) -> None:
    titles = ["feature", "label", "top tokens", "kind", "tokens", "density", "mean", "largest", "values", "most in"]
    found = panel.one("table")
    assert headings(found) == titles
    for cells, row in zip(body(found), rows, strict=True):
        number, label, pieces, kind, *numbers, picture, source = cells
        assert number.words == str(row["feature_id"])
        leads_to(number, "features", row["feature_id"])
        text_is(label, row["label"], "")
        pieces_are(pieces, row["pieces"])
        assert [each.words for each in pieces.all("small")] == [per_cent(each, 2) for each in row["shares"]]
        named = row["main_source"] is not None
        assert source.words == (f"{visible(row['main_source'])} {per_cent(row['source_share'], 2)}" if named else "")
        assert kind.words == row["kind"]
        for cell, name in zip(numbers, ("n_tokens", "density", "mean_value", "max_value"), strict=True):
            number_is(cell.words, row[name])
        bars = [count for count in row["histogram"] if count]
        assert len(picture.all("svg")) == bool(bars)
        assert sum(each.attributes["d"].count("M") for each in picture.all("path")) == len(bars)


RUN = {
    "model": "model", "site": "site", "architecture": "architecture", "tokens": "n_tokens", "features": "n_features",
    "L0": "l0", "variance unexplained": "variance_unexplained", "loss recovered": "loss_recovered_zero",
    "dead": "dead_share", "size": "n_bytes", "date": "written", "state": "state",
}  # fmt: skip
"""What a run's headings stand for."""


def run_fact(cell: Element, row: Mapping[str, Any], name: str) -> None:
    value = row[name]
    if value is None:
        assert cell.words == NONE, name
    elif name in ("dead_share", "loss_recovered_zero"):
        assert cell.words.endswith("%")
        assert abs(float(cell.words[:-1]) - 100 * value) <= 0.0051 * abs(100 * value) + 1e-12
    elif name == "n_bytes":
        assert cell.words == human_bytes(value)
    elif name == "written":
        assert cell.one("time").attributes["datetime"] == f"{value.isoformat(timespec='seconds')}Z"
        assert cell.words == value.isoformat(" ", "minutes")
    elif name == "model":
        assert cell.one("span").attributes["title"] == visible(value)
        assert visible(value).endswith(cell.words)
    elif name == "state":
        assert cell.words.startswith(value)
        assert (row["l0_missed"] or "") in cell.words
    else:
        number_is(cell.words, value)


def runs(panel: Element, rows: Rows, words: Words) -> None:
    """A list of all runs, or some runs side by side."""
    found = panel.one("table")
    if headings(found)[0] == "measure":
        chosen = [next(row for row in rows if row["schema_name"] == name) for name in headings(found)[1:]]
        lines = body(found)
        assert [cells[0].words for cells in lines] == list(RUN)
        for (_, *cells), name in zip(lines, RUN.values(), strict=True):
            for cell, row in zip(cells, chosen, strict=True):
                run_fact(cell, row, name)
        return
    several = len(rows) > 1
    assert headings(found) == [*(["compare"] if several else []), "run", *RUN]
    for cells, row in zip(body(found), rows, strict=True):
        name, *facts = cells[several:]
        assert name.words == visible(row["schema_name"] if row["problem"] is None else row["name"])
        for cell, column in zip(facts, RUN.values(), strict=True):
            run_fact(cell, row, column)


def settings(panel: Element, rows: Rows, words: Words) -> None:
    differing = [row for row in rows if row["differs"]]
    for found, mine in zip(panel.all("table"), (differing, rows), strict=True):
        assert headings(found) == ["setting", "value", "default", "meaning"]
        for cells, row in zip(body(found), mine, strict=True):
            name, value, usual, meaning = cells
            assert name.words == f"{row['section']}.{row['setting']}"
            text_is(value, row["value"])
            text_is(usual, row["usual"])
            assert meaning.words == (row["about"] or "")


def stages(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    assert headings(found) == ["stage", "artefact", "size", "seconds", "date", "machine"]
    for cells, row in zip(body(found), rows, strict=True):
        stage, artefact, size, seconds, date, machine = cells
        assert stage.words == row["stage"]
        text_is(artefact, row["artefact"])
        run_fact(size, row, "n_bytes")
        number_is(seconds.words, row["seconds"])
        run_fact(date, row, "written")
        text_is(machine, row["host"])


def matches(panel: Element, rows: Rows, words: Words) -> None:
    found = panel.one("table")
    assert headings(found) == list(rows[0])
    assert list(rows[0])[:2] == ["feature_id", "match_id"]
    for cells, row in zip(body(found), rows, strict=True):
        leads_to(cells[0], "features", row["feature_id"])
        for cell, value in zip(cells, row.values(), strict=True):
            number_is(cell.words, value)


def counts(panel: Element, rows: Rows, words: Words) -> None:
    """How many features of each kind, and of all kinds."""
    number_is(panel.one("strong").words, sum(row["n_features"] for row in rows))
    shown = [each.words.split(" ", 1) for each in panel.all("a") if "sql" not in each.classes]
    assert shown == [[f"{row['n_features']:,}", row["kind"]] for row in rows]


VIEWS: dict[str, Callable[[Element, Rows, Words], None]] = {
    "feature_numbers": facts, "feature_pair": facts, "feature_values": histogram, "feature_histogram": histogram,
    "feature_logits": logits, "similar_features": neighbours, "coactive_features": neighbours,
    "feature_companions": neighbours, "context": place, "document_tokens": text, "find_features": features,
    "count_features": counts, "runs": runs, "settings": settings, "training_curve": curves, "stages": stages,
    "density_histogram": densities, "density_and_max": scatter, "compare_runs": matches,
    "classes_of_feature": tells, "features_of_class": tells, "measured_effects": effects, "effects_on_entries": moved,
    "entry_features": entry, "entry_followers": followers, "text_tokens": text,
}  # fmt: skip

VIEWS_OF_CONTEXTS: dict[str, Callable[[Element, Rows, Mapping[str, str]], None]] = {
    "feature_examples": examples, "feature_contexts": contexts, "random_contexts": contexts, "feature_bands": bands,
    "near_miss_contexts": near_misses, "tokens_in_text": chosen, "effect_contexts": effect_contexts,
    "explanation_mistakes": mistakes, "class_in_text": spans,
}  # fmt: skip


def panel_is(panel: Element, question: str, asked: Mapping[str, str], rows: Rows, words: Words) -> None:
    """A panel shows these rows, or the first of them and says so."""
    (more,) = panel.all("p.more") or [None]
    if more is not None:
        n_shown = int(more.words.split()[2].replace(",", ""))
        assert n_shown < len(rows), "there are no more rows"
        rows = rows[:n_shown]
    assert bool(panel.all("p.empty")) == (not rows)
    if not rows:
        return
    if panel.attributes["id"] == "rows":  # the question's own page
        table(panel, rows, words)
    elif question in VIEWS_OF_CONTEXTS:
        VIEWS_OF_CONTEXTS[question](panel, rows, asked)
    else:
        VIEWS.get(question, table)(panel, rows, words)
