"""What every benchmark prints last: one JSON object with the figures asked and measured."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal

from saeflow.cli.doctor import processor


@dataclass
class Bar:
    """A figure: what was asked, what was measured. `spread` is that of three alternations, None for exact figures."""

    name: str
    asked: float
    sense: Literal[">=", "<="]
    measured: float | None
    spread: float | None = None
    reason: str | None = None
    """Why there is no measurement."""

    @property
    def holds(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.asked if self.sense == ">=" else self.measured <= self.asked


def arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="under a minute, smaller sizes")
    return parser.parse_args()


def report(name: str, bars: list[Bar], **facts: Any) -> None:
    """Print the figures for a person, then the JSON line."""
    for bar in bars:
        verdict = {True: "holds", False: "MISSES", None: f"not measured: {bar.reason}"}[bar.holds]
        print(f"{bar.name}: {bar.measured} (asked {bar.sense} {bar.asked}) {verdict}")
    about = {"benchmark": name, "processor": processor(), "python": platform.python_version()}
    print(json.dumps(about | facts | {"bars": [asdict(bar) | {"holds": bar.holds} for bar in bars]}))
