"""Measure what a model does when features are changed: plan, parts, one artefact `effects/NAME-FP`.

A run that is killed goes on with the parts that it has finished, and ends with the files of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from saeflow.features.changes import FeatureChange
from saeflow.features.splice import unit_lengths
from saeflow.meaning.effects import firings
from saeflow.meaning.effects.branches import SharedPass, choose_pass
from saeflow.meaning.effects.part import PartMeasurer
from saeflow.meaning.effects.run_model import RunModel, model_of_run
from saeflow.meaning.effects.tables import (
    DIRECT_FILE,
    EFFECTS_FILE,
    direct_logits,
    entries_moved,
    sort_into,
    write_parquet,
)
from saeflow.meaning.feature_list import parse_features
from saeflow.query.ask import FeatureStrengths, strengths_of
from saeflow.query.catalog import write_catalog
from saeflow.query.connection import connect_to_run
from saeflow.query.runs import Run
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.fingerprint import fingerprint
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.text import brief
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder
from saeflow.store.links import remove
from saeflow.store.store import Store

EFFECTS_COMMAND = "saeflow effects RUN --model FOLDER"
_RESUMED = ".checkpoint"
_MOST_AHEAD, _MOST_TOP, _MOST_BANDS = 256, 100, 1_000


@dataclass(frozen=True)
class EffectSettings:
    """Settings of a measurement."""

    features: str = "all"
    """Numbers and ranges, such as `3,17,40-59`; or `all`."""
    change: str = "zero"
    n: int = 200
    """Firings of each feature, drawn from all bands alike; 0: all."""
    bands: int = 10
    """Quantile bands."""
    ahead: int = 3
    """Tokens after the changed one whose predictions are compared, too."""
    top: int = 5
    """Entries that gained most, and lost most, of each prediction."""
    seed: int = 0
    fast: bool = False
    """Run the model in its own precision, not in float64: about twice as quick, and less exact."""
    name: str = ""
    """Name of the artefact; by default that of the change."""

    def require_sensible(self) -> None:
        """Raise UserError for a number out of its range, or a name that is none."""
        for setting, least, most in (
            ("n", 0, 1 << 40), ("bands", 1, _MOST_BANDS), ("ahead", 0, _MOST_AHEAD), ("top", 1, _MOST_TOP),
            ("seed", 0, 1 << 62),
        ):  # fmt: skip
            if not least <= getattr(self, setting) <= most:
                raise UserError(f"--{setting} is {getattr(self, setting)}; it may be {least} to {most:,}.")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.artefact_name):
            raise UserError(f"--name is {brief(self.artefact_name)!r}; use letters, digits and . - _, at most 64.")

    @property
    def artefact_name(self) -> str:
        change = str(FeatureChange.parse(self.change)).replace("*", "").replace("+", "")
        return self.name or re.sub("^-", "minus", change)


@dataclass(frozen=True)
class MeasuredEffects:
    """The artefact, and what a person is told about it."""

    artefact: Artefact
    was_there: bool

    @property
    def facts(self) -> dict[str, Any]:
        return self.artefact.record.facts


def measure_effects(
    store: Store, run_name: str | None, settings: EffectSettings, progress: Progress, device: str = "auto",
    model_path: str = "",
) -> MeasuredEffects:  # fmt: skip
    """Change firings of features, each alone, and store what the model then predicts. Returns what is published.

    Memory: the model, the SAE, logits of one pass in each thread, and the rows of one part. Raises UserError before the
    work for settings that cannot be, and for a run whose model is not there or does not predict the next token.
    """
    settings.require_sensible()
    change = FeatureChange.parse(settings.change)
    run, connection = connect_to_run(store, run_name, names=firings.READS)
    with contextlib.closing(connection):
        features = parse_features(settings.features, run.shape.get("n_features") or 0)
        strengths = strengths_of(connection, run, features)
        if not sum(strengths.n_tokens):
            raise UserError("--features names features that never fire. Choose others: saeflow ask feature_summary.")
        config = model_of_run(store, run, model_path, device, EFFECTS_COMMAND)
        facts = _facts(store, run, settings, change, features)
        target = store.artefact("effects", settings.artefact_name, fingerprint(facts))
        with target.writing():
            if target.complete():
                if store.newest_of("effects", run.artefact.id).get(target.name) != target:
                    target.renew()
                progress.skip("effects", str(target.path))
                return MeasuredEffects(target, True)
            work = _Measurement(store, run, connection, settings, change, features, strengths, config, target, progress)
            work.do(facts)
        write_catalog(store)
    return MeasuredEffects(target, False)


def _facts(
    store: Store, run: Run, settings: EffectSettings, change: FeatureChange, features: Sequence[int]
) -> dict[str, Any]:
    """Return what the effects depend on. They belong to one generation of the run, and one of its tokens."""
    tokens, activations = (store.input_of(run.artefact, kind) for kind in ("tokens", "activations"))
    return {
        "run": run.artefact.id,
        "run_list": run.artefact.manifest()[1],
        "tokens_list": tokens.manifest()[1],
        "model": activations.record.facts.get("model"),
        "change": str(change),
        "features": list(features),
        "n": settings.n,
        "bands": settings.bands,
        "ahead": settings.ahead,
        "top": settings.top,
        "seed": settings.seed,
        **({"fast": True} if settings.fast else {}),
    }


@dataclass(frozen=True)
class _Measurement:
    """One measurement on its way."""

    store: Store
    run: Run
    connection: duckdb.DuckDBPyConnection
    settings: EffectSettings
    change: FeatureChange
    features: Sequence[int]
    strengths: FeatureStrengths
    config: ModelConfig
    target: Artefact
    progress: Progress

    @property
    def folder(self) -> Path:
        """Finished parts lie here until all are; the next run with these settings goes on with them."""
        return self.target.work.with_name(f"{self.target.work.name}{_RESUMED}")

    def do(self, facts: dict[str, Any]) -> None:
        settings = self.settings
        loaded = RunModel.load(self.store, self.run, self.config)
        if not settings.fast:
            loaded.model.double()
        make_folder(self.folder)
        self.progress.say("effects: choosing firings")
        drawn = firings.draw_firings(
            self.connection, self.features, self.strengths.n_tokens, settings.n, settings.bands, settings.seed,
            self.folder,
        )  # fmt: skip
        n_firings = pq.read_metadata(drawn).num_rows
        if not n_firings:
            remove(self.folder)
            raise UserError(
                "Every firing of these features lies behind a forgotten document in its sequence, so its context is "
                "gone.\nName other features: saeflow ask feature_summary."
            )
        n_positions, parts = self._measure_parts(loaded, drawn)
        about = facts | {"n_firings": n_firings, "measured_ahead": n_positions - 1}
        with self.target.publish_folder(about, self._inputs(), {"model": self.config.path}) as folder:
            sort_into(folder / EFFECTS_FILE, parts, "feature_id, token_id, ahead", self.folder)
            direct = direct_logits(
                self.target.name, entries_moved(folder / EFFECTS_FILE), loaded.sae.W_dec, loaded.model,
                loaded.place.target, loaded.n_vocab,
            )  # fmt: skip
            write_parquet(folder / DIRECT_FILE, direct)
        remove(self.folder)

    def _inputs(self) -> list[str]:
        record = self.run.artefact.record
        kinds = [record.input(kind) for kind in ("saes", "activations", "tokens")]
        return [self.run.artefact.id, *(name for name in kinds if name is not None)]

    def _measure_parts(self, loaded: RunModel, drawn: Path) -> tuple[int, list[Path]]:
        """Measure the parts that are not finished. Returns how many positions each firing has, and the parts' files."""
        place, sae = loaded.place, loaded.sae
        chosen = choose_pass(loaded.model, place.read, place.target, sae.W_dec.shape[1], loaded.context_length)
        if chosen.kind is not SharedPass:
            self.progress.say("effects: this model takes no mask of branches, so each change runs its whole sequence")
        n_positions = 1 + (self.settings.ahead if chosen.reaches_later else 0)
        if n_positions <= self.settings.ahead:
            self.progress.say("effects: no layer after the site reads earlier tokens, so later tokens cannot change")
        running = chosen.kind(loaded.model, place.read, place.target, lambda x: unit_lengths(sae, x))
        measurer = PartMeasurer(
            running, sae, self.target.name, self.change, dict(zip(self.features, self.strengths.levels, strict=True)),
            loaded.context_length, n_positions, self.settings.top, loaded.n_vocab,
        )  # fmt: skip
        with contextlib.closing(running), pq.ParquetFile(drawn) as file:
            return n_positions, self._finished_parts(measurer, file)

    def _finished_parts(self, measurer: PartMeasurer, file: pq.ParquetFile) -> list[Path]:
        paths = [self.folder / f"{number:06d}.parquet" for number in range(file.num_row_groups)]
        rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        with self.progress.bar("effects", sum(rows), "firings") as bar:
            bar.resume_at(sum(n for n, path in zip(rows, paths, strict=True) if path.is_file()))
            for number, path in enumerate(paths):
                if not path.is_file():
                    write_parquet(path, measurer.measure(self.connection, file.read_row_group(number)))
                    self.target.require_lease()
                    bar.advance(rows[number])
        return paths
