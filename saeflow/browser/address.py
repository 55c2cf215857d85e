"""What an address says: the filter of a feature's panels, and where a list goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from saeflow.browser.panels import address_of_run, as_query
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief

FILTER = (
    "source", "document_key", "since", "until", "role", "threshold", "with_feature", "without_feature",
)  # fmt: skip
"""Parameters that every filtered question ends with."""

LARGEST = (1 << 63) - 1
"""No number of an address is larger: it fits DuckDB's bigint."""

WINDOW = ("before", "after")
"""Tokens on either side of a context."""

IN_WORDS = {
    "source": "source",
    "document_key": "document",
    "since": "written since",
    "until": "written until",
    "role": "role",
    "threshold": "value above",
    "with_feature": "where feature … fires too",
    "without_feature": "where feature … is silent",
}


@dataclass(frozen=True)
class Filter:
    """The filter in force on a page. Empty fields filter nothing."""

    values: Mapping[str, str]

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Filter:
        given = {name: query[name] for name in FILTER if query.get(name, "").strip()}
        if set(given.get("threshold", "")) <= set("0. "):  # 0 keeps every value
            given.pop("threshold", None)
        return cls(given)

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def in_words(self) -> list[tuple[str, str]]:
        """What the filter bar says is in force."""
        return [(IN_WORDS[name], value) for name, value in self.values.items()]


@dataclass(frozen=True)
class Asked:
    """A request: the words of its path, those of its query, and the form a browser sent."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    form: Mapping[str, str]
    address: str
    """Path and query as they were asked for, without the format."""
    format: str = ""
    """Empty for HTML, else json, csv or parquet."""

    @property
    def filter(self) -> Filter:
        return Filter.of(self.query)

    def given(self, *names: str) -> dict[str, object]:
        """Return those words of the query that are not empty."""
        return {name: self.query[name] for name in names if self.query.get(name, "") != ""}

    def switch(self, name: str) -> bool:
        return self.query.get(name, "") in ("1", "on", "yes")

    def count(self, name: str, default: int, most: int) -> int:
        """Return a number of the query that is not below 0, at most `most`. Raises UserError if it is none."""
        word = self.query.get(name, "").strip()
        return min(whole_number(name, word), most) if word else default

    def number(self, name: str) -> int:
        """Return a number of the path. Raises UserError if it is none."""
        return whole_number(name, self.path[name])

    def link(self, **changes: object) -> str:
        """Return this address with words of its query replaced. None takes one out."""
        return self.address.partition("?")[0] + as_query({**self.query, **changes})

    @property
    def unfiltered(self) -> str:
        return self.link(**dict.fromkeys(FILTER))


def whole_number(name: str, word: str) -> int:
    """Return a number of an address that is not below 0, at most `LARGEST`. Raises UserError if it is none."""
    if not (word.isascii() and word.isdigit()):
        raise UserError(f"{name} is {brief(word)!r}, but it must be a whole number from 0 on.")
    return min(int(word[:20]), LARGEST)


def address_of_panel(
    schema: str, feature: int, panel: str, values: Mapping[str, object], vocab: int | None = None
) -> str:
    """Return the address of a panel's own page. The filter and the window of the contexts come along."""
    kept = {name: values.get(name) or None for name in FILTER} | {name: values.get(name) for name in WINDOW}
    kept["vocab"] = vocab
    return f"{address_of_run(schema)}/features/{feature}/{panel}{as_query(kept)}"
