"""A reader of pages, who follows every SQL link and asks each statement by a connection of its own."""

from __future__ import annotations

import random
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
from starlette.testclient import TestClient

from saeflow.query.questions import find_question, parse_arguments
from tests.browser import reading
from tests.support.html_tree import Element, parsed

READS = ("features_of_text", "text_tokens")
"""Their statements say that they run the model, so that no connection can ask them."""

LINES = ("counts", "words")
"""Panels that are a line of text: numbers of features, and where the words of a table's features come from."""


@dataclass
class Reader:
    """Reads pages as a person does. `follows`: asks each SQL link for its statement, which takes as long as a panel.

    Otherwise the statement is the one that the page's JSON has for a panel of the link's question and arguments.
    """

    pages: TestClient
    connection: duckdb.DuckDBPyConnection
    name: str
    follows: bool = True

    @property
    def run(self) -> str:
        return f"/runs/{self.name}"

    def rows(self, statement: str) -> reading.Rows:
        found: reading.Rows = self.connection.execute(statement).to_arrow_table().to_pylist()
        return found

    def json(self, address: str) -> dict[str, Any]:
        path, _, query = address.partition("?")
        answer = self.pages.get(f"{path}.json?{query}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def read(self, address: str) -> list[str]:
        """Compare every panel of a page with its SQL link's answer; return their names."""
        answer = self.pages.get(address)
        assert answer.status_code == 200, f"{address}: {answer.text}"
        page, names, found = parsed(answer.text), [], self.json(address)
        shown = [each for each in page.within() if each.classes == ["panel"] or each.attributes.get("id") in LINES]
        shown.sort(key=lambda panel: panel.attributes["id"] != "words")
        words: reading.Words = {}
        for panel in shown:
            link = panel.all("a.sql")[0].attributes["href"]
            names.append(panel.attributes["id"])
            try:
                rows = self.rows_of(link, found["panels"][names[-1]])
                if names[-1] == "words":
                    words = {row["feature_id"]: row for row in rows}
                else:
                    reading.panel_is(panel, *question_of(link), rows, words)
            except (AssertionError, ValueError) as error:
                raise AssertionError(f"{names[-1]} of {address}: {error}") from error
        self.whole(page, found, names)
        return names

    def rows_of(self, link: str, told: dict[str, Any]) -> reading.Rows:
        """The rows of an SQL link, which asks what the page's JSON tells of the panel."""
        name, asked = question_of(link)
        question = find_question(name)
        assert name == told["question"]
        assert parse_arguments(question, asked) == parse_arguments(question, told["arguments"])
        answer = self.json(link)["panels"]["rows"] if self.follows else told
        statement = answer["sql"].partition(f" limit {len(told['rows'])};")[0] if told["has_more"] else answer["sql"]
        found: reading.Rows = answer["rows"] if name in READS else self.rows(statement)
        return found

    @staticmethod
    def whole(page: Element, found: dict[str, Any], names: list[str]) -> None:
        """No panel of the JSON is missing on the page or twice; the label and the filter stand in both."""
        assert sorted(names) == sorted(found["panels"])
        label = f": {reading.visible(found['label'])}" if found.get("label") else ""
        assert page.one("h1").text == reading.visible(found["title"]) + label
        in_force = page.all(".filter-in-force")
        assert bool(in_force) == bool(found["filter"])
        for value in found["filter"].values():
            assert reading.visible(value) in [each.words for each in in_force[0].all("bdi")]


def question_of(link: str) -> tuple[str, dict[str, str]]:
    """The question that an SQL link asks, and its arguments."""
    path, _, query = link.partition("?")
    return path.rpartition("/")[2], dict(urllib.parse.parse_qsl(query))


def random_filter(dice: random.Random, reader: Reader) -> dict[str, object]:
    """Two or three settings of a filter; often they leave nothing."""
    documents = reader.rows("from documents order by document_id")
    sources, keys = (sorted({row[name] for row in documents}) for name in ("source", "key"))
    n_features = len(reader.rows("select feature_id from stg_feature_stats"))
    every: dict[str, Sequence[object]] = {
        "source": sources, "document_key": keys, "since": ["1810", "1813-01-28"], "until": ["1814", "1820-05"],
        "threshold": [0.001, 0.05, 0.2, 0.5, 1, 2], "with_feature": range(n_features),
        "without_feature": range(n_features),
    }  # fmt: skip
    return {name: dice.choice(every[name]) for name in dice.sample(list(every), dice.randint(2, 3))}


def as_query(**values: object) -> str:
    return urllib.parse.urlencode(values)
