"""Run a recipe's stages on a small sample and measure each; the answer is JSON.

Run as `python -m saeflow.pipeline.forecast.trial_run RECIPE.json STORE`: a process of its own, so that start-up and
memory are those of a run.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from saeflow.pipeline import run as pipeline
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import measure_usage
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.store import Store


@dataclass
class Bars:
    """Hears the bars of the stages: when each reached how many units."""

    heard: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def hear(self, bar: Bar) -> None:
        self.heard.setdefault(bar.stage, []).append((time.monotonic(), bar.done))

    def rates(self) -> dict[str, float]:
        """Units per second by bar, over its second half, when it is under way; 0 where too little was heard."""
        return {stage: _steady(points) for stage, points in self.heard.items()}

    def seconds(self) -> float:
        """Under way, all bars together."""
        return sum(points[-1][0] - points[0][0] for points in self.heard.values())

    def counts(self) -> dict[str, int]:
        return {stage: points[-1][1] for stage, points in self.heard.items()}


def _steady(points: list[tuple[float, int]]) -> float:
    moved = [point for i, point in enumerate(points) if not i or point[1] > points[i - 1][1]]
    later = moved[len(moved) // 2 - 1 :] if len(moved) > 3 else moved
    seconds = later[-1][0] - later[0][0]
    return (later[-1][1] - later[0][1]) / seconds if seconds > 0 else 0.0


def run(recipe: Recipe, store: Store) -> dict[str, object]:
    """Seconds, peak memory and the bars of every stage, and what the store holds then."""
    found: dict[str, object] = {}
    lineage = Lineage(store, recipe)
    for name, stage in pipeline.stages_of_run(recipe).items():
        bars = Bars()
        with measure_usage() as taken:
            stage(lineage, Progress(verbosity=-1, listener=bars.hear))
        found[name] = asdict(taken) | {"rates": bars.rates(), "counts": bars.counts(), "working": bars.seconds()}
    source, stored, encoded = lineage.tokens, lineage.activations, lineage.features
    return {
        "stages": found,
        "n_tokens": source.published().total("n_tokens"),
        "n_sequences": source.published().total("n_sequences"),
        "n_values": encoded.published().total("n_values"),
        "token_bytes": sum(part.n_bytes for part in source.published().parts),
        "activation_bytes": sum(part.n_bytes for part in stored.published().parts),
        "feature_bytes": sum(part.n_bytes for part in encoded.published().parts),
        "sae_bytes": sum(
            s.record.files[i].n_bytes for s in store.artefacts("saes") for i in range(len(s.record.files))
        ),
        "widths": [site.width for site in lineage.stored_sites],
    }


REFUSED = 2
"""What the process returns after an error that a user can mend: then its answer is `{"refused": message}`."""


def main(recipe_file: Path, folder: Path) -> int:
    try:
        found = run(Recipe.model_validate_json(recipe_file.read_text("utf-8")), Store.create(folder))
    except UserError as error:
        print(json.dumps({"refused": str(error)}))
        return REFUSED
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
