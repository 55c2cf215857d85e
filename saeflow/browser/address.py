"""What an address says: the filter of a feature's panels, and where a list goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FILTER = (
    "source", "document_key", "since", "until", "role", "threshold", "with_feature", "without_feature",
)  # fmt: skip
"""Parameters that every filtered question ends with."""

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
        return cls({name: query[name] for name in FILTER if query.get(name, "").strip()})

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

    @property
    def filter(self) -> Filter:
        return Filter.of(self.query)

    def given(self, *names: str) -> dict[str, object]:
        """Return those words of the query that are not empty."""
        return {name: self.query[name] for name in names if self.query.get(name, "") != ""}

    def switch(self, name: str) -> bool:
        return self.query.get(name, "") in ("1", "on", "yes")
