"""The rows of all parts as bars, as a table in Markdown, and as JSON, with each row's share of the card's limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tests.benchmarks._bars import Bar
from tests.benchmarks._gpu.measure import Row
from tests.benchmarks._gpu.parts import COPY, MATMUL

Found = Mapping[str, Sequence[Row]]
"""Rows by part."""


class Tables:
    """What was found, and what this card reaches."""

    def __init__(self, found: Found, is_toy: bool = False) -> None:
        self.found, self.is_toy = found, is_toy
        limits = {row.name: row.value for row in found.get("limits", ())}
        self.flops = 1e12 * (limits.get(MATMUL) or 0)
        self.n_bytes = 1e9 * (limits.get(COPY) or 0)

    def limit(self, row: Row) -> float | None:
        """Return the least milliseconds of a row's work: computing and moving, one after the other."""
        if not (row.flops or row.n_bytes) or not (self.flops and self.n_bytes):
            return None
        return 1e3 * (row.flops / self.flops + row.n_bytes / self.n_bytes)

    def share(self, row: Row) -> float | None:
        """Return the row's share of the limit: 1 is as fast as the card can be."""
        limit = self.limit(row)
        if limit is None or not row.value:
            return None
        return limit / (row.value if row.unit == "ms" else 1e3 * _rows_of(row.name) / row.value)

    def bars(self) -> list[Bar]:
        rows = [row for rows in self.found.values() for row in rows]
        if self.is_toy:  # of sizes where nothing but errors means anything
            rows = [replace(row, asked=None if row.unit else row.asked, asked_share=None) for row in rows]
        bars = [self._bar(row) for row in rows if row.asked is not None or row.note]
        shares = [(row, self.share(row)) for row in rows if row.asked_share is not None]
        bars += [
            Bar(f"{row.name}: share of the card's limit", row.asked_share or 0, ">=", share, _spread(row, share),
                None if share else "the card's rates are missing")
            for row, share in shares
        ]  # fmt: skip
        return bars

    def _bar(self, row: Row) -> Bar:
        return Bar(row.name, row.asked or 0.0, row.sense, row.value, row.spread, row.note or None)

    def markdown(self, about: Mapping[str, Any]) -> str:
        lines = ["# Kernels on a GPU", "", *(f"- {name}: {value}" for name, value in about.items())]
        for part, rows in self.found.items():
            lines += [
                "",
                f"## {part}",
                "",
                "| | measured | spread | limit, ms | share | asked |",
                "| --- |" + " ---: |" * 5,
            ]
            lines += [self._line(row) for row in rows]
        return "\n".join([*lines, ""])

    def _line(self, row: Row) -> str:
        if row.value is None:
            return f"| {_cell(row.name)} | {_cell(row.note)} | | | | |"
        measured = f"{_number(row.value)} {row.unit} {row.note}".strip()
        limit, share = self.limit(row), self.share(row)
        asked = f"{row.sense} {_number(row.asked)}" if row.asked is not None else ""
        asked = f"share >= {row.asked_share}" if row.asked_share is not None else asked
        cells = [row.name, measured, *map(_number, (row.spread, limit, share)), asked]
        return f"| {' | '.join(map(_cell, cells))} |"

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        return {
            part: [asdict(row) | {"limit_ms": self.limit(row), "share": self.share(row)} for row in rows]
            for part, rows in self.found.items()
        }


def _rows_of(name: str) -> float:
    """Return the rows of a batch, which a row's name ends its size with."""
    return float(name.partition("B=")[2].partition(":")[0].replace(",", ""))


def _spread(row: Row, share: float | None) -> float | None:
    return share * row.spread / row.value if share and row.spread is not None and row.value else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
