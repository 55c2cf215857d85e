"""Keep the labels and scores of explained features, and the examples that cost points.

Scores are written last. A feature that has them under the same settings is finished, and is not asked about again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from saeflow.features.schema import EXPLANATION_MISTAKES, EXPLANATION_SCORES
from saeflow.meaning.beside_labels import path_beside, read_beside, replace_rows
from saeflow.meaning.language_model.feature import ExplainedFeature
from saeflow.query.labels import Label, clean_label, put
from saeflow.store.store import Store

FINISHED = "explanation"
"""Method of the one row that says with which settings a feature was finished."""


@dataclass(frozen=True)
class Results:
    """The files of one source of labels beside its CSV file, and the rows of one judge in them."""

    store: Store
    sae: str
    """Name and fingerprint of the SAE, without its kind."""
    source: str
    model: str
    tokens: str
    makes_labels: bool = True
    """False if the labels are another's, and only their scores are kept."""

    def path(self, table: str) -> Path:
        return path_beside(self.store, self.sae, self.source, table)

    def finished(self) -> dict[int, str]:
        """Return the settings under which each feature was finished."""
        table, _ = read_beside(self.store, self.path("scores"), EXPLANATION_SCORES)
        mine = [row for row in table.to_pylist() if row["method"] == FINISHED and self._is_mine(row)]
        return {row["feature_id"]: row["settings"] for row in mine}

    def _is_mine(self, row: Mapping[str, Any]) -> bool:
        return bool(row["model"] == self.model and row["tokens"] == self.tokens)

    def write(self, done: Sequence[tuple[ExplainedFeature, str]]) -> None:
        """Keep features with their settings. A command that is killed in between does the same again.

        Call it while no other command changes the files of this source.
        """
        features = [each.feature for each, _ in done]
        mistakes = [row for each, _ in done for row in self._mistakes(each)]
        scores = [row for each, settings in done for row in self._scores(each, settings)]
        self._replace("mistakes", EXPLANATION_MISTAKES, features, mistakes)
        if self.makes_labels:
            put(
                self.store,
                f"saes/{self.sae}",
                self.source,
                {each.feature: _label_of_explanation(each) for each, _ in done},
            )
        self._replace("scores", EXPLANATION_SCORES, features, scores)

    def _replace(self, table: str, schema: pa.Schema, features: list[int], rows: list[dict[str, Any]]) -> None:
        owned = {"model": self.model, "tokens": self.tokens}
        replace_rows(self.store, self.path(table), schema, features, owned, rows)

    def _scores(self, done: ExplainedFeature, settings: str) -> list[dict[str, Any]]:
        common: dict[str, Any] = {
            "feature_id": done.feature,
            "model": self.model,
            "tokens": self.tokens,
            "settings": settings,
        }
        made: dict[str, Any] = {
            "method": FINISHED, "stratum": "all", "n": done.n_explaining, "n_unusable": int(done.explanation is None),
        }  # fmt: skip
        rows: list[dict[str, Any]] = [
            {"method": method, "stratum": each.stratum, "score": each.score, "low": each.low, "high": each.high,
             "n": each.n, "n_unusable": each.n_unusable}
            for method, scores in done.scores.items()
            for each in scores
        ]  # fmt: skip
        return [common | row for row in (made, *rows)]

    def _mistakes(self, done: ExplainedFeature) -> list[dict[str, Any]]:
        return [
            {"feature_id": done.feature, "model": self.model, "tokens": self.tokens, "method": method,
             "stratum": each.stratum, "token_id": each.token_id, "asked": each.asked, "answered": each.answered}
            for method, judged in done.judged.items()
            for each in sorted(judged, key=lambda each: each.token_id)
            if each.answered is not None and each.answered != each.asked
        ]  # fmt: skip


def _label_of_explanation(done: ExplainedFeature) -> Label | None:
    """Return the label with its detection score, or else the fuzzing score."""
    if done.explanation is None:
        return None
    scores: Iterable[float | None] = (done.score(method) for method in ("detection", "fuzzing"))
    score = next((score for score in scores if score is not None), None)
    return clean_label(done.explanation, None if score is None else round(score, 6), f"feature {done.feature}")
