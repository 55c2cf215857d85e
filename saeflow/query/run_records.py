"""What the records say of a run beside its values: its stages, its settings, and the log of its training.

Only small files are read. What a record does not say is null: nothing is guessed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from saeflow.recipe.data_settings import ActivationsConfig, CorpusConfig, TokensConfig
from saeflow.recipe.section import Section
from saeflow.recipe.settings import FeedConfig, SAEConfig, TrainConfig
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.store.records import FileRecord, damaged
from saeflow.store.store import Store

UNREADABLE_RECORD = (UserError, OSError, ValueError, KeyError, AttributeError, TypeError, pa.ArrowException)
"""What a missing, truncated or nonsensical record raises."""

LOG = "log.parquet"
"""The log of a training, beside the weights of its SAE."""

_SETTINGS_OF: dict[str, type[Section]] = {
    "corpus": CorpusConfig, "tokens": TokensConfig, "activations": ActivationsConfig,
    "feed": FeedConfig, "sae": SAEConfig, "train": TrainConfig, "features": ActivationsConfig,
}  # fmt: skip


def ancestors(store: Store, artefact: Artefact) -> dict[str, Artefact]:
    """Return the artefacts that a run was made from, and the run itself, by kind and in the order of the stages."""
    made_from = (
        store.by_id(name) for kind in ("tokens", "activations", "saes") if (name := artefact.record.input(kind))
    )
    return {**{each.kind: each for each in made_from}, artefact.kind: artefact}


def stages(made: Mapping[str, Artefact]) -> list[dict[str, object]]:
    """Return a row for each artefact: its size, when, where and in how many seconds it was made."""
    return [{"stage": kind, "artefact": each.id, **_stage(each)} for kind, each in made.items()]


def _stage(artefact: Artefact) -> dict[str, object]:
    known = provenance(artefact)
    n_bytes = None
    with contextlib.suppress(*UNREADABLE_RECORD):
        n_bytes = artefact.n_bytes()
    seconds, written = (_number_or_none(known.get(name)) for name in ("seconds", "written"))
    return {"n_bytes": n_bytes, "seconds": seconds, "written": written, "host": _text_or_none(known.get("host"))}


def provenance(artefact: Artefact) -> dict[str, Any]:
    """Return what provenance.json says; nothing if it cannot be read."""
    with contextlib.suppress(*UNREADABLE_RECORD):
        return dict(read_json(artefact.own_file("provenance.json")))
    return {}


def model_of(made: Mapping[str, Artefact]) -> str | None:
    """Return the folder or name of the language model that the activations came from."""
    return _text_or_none(provenance(made["activations"]).get("model")) if "activations" in made else None


def log_of(made: Mapping[str, Artefact]) -> list[str]:
    """Return the location of the training's log, if it is there in its full size."""
    if (sae := made.get("saes")) is None:
        return []
    with contextlib.suppress(*UNREADABLE_RECORD):
        known = [file for file in sae.record.files if file.name == LOG]
        for file in known:
            sae.storage.look_once(f"{sae.id} {file}", partial(_require_size, sae, file))
        sae.storage.note_recorded(sae.path, known)
        return [sae.storage.location(sae.path / LOG) for _ in known]
    return []


def _require_size(artefact: Artefact, file: FileRecord) -> None:
    if artefact.storage.size(f"{artefact.path}/{file.name}") != file.n_bytes:
        raise damaged(artefact.path / file.name)


def settings(made: Mapping[str, Artefact]) -> list[dict[str, object]]:
    """Return a row for each recorded setting, with its value and the recipe's default as JSON."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for kind, each in made.items():
        with contextlib.suppress(*UNREADABLE_RECORD):
            for section, name, value in _settings_in(kind, each.record.facts):
                known = {"section": section, "setting": name, "value": json.dumps(value), **_default(section, name)}
                rows.setdefault((section, name), known)
    return list(rows.values())


def _settings_in(kind: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Yield section, setting and value of a record's facts. Facts in sections are settings; others name the kind."""
    for name, value in facts.items():
        if isinstance(value, dict) and name in _SETTINGS_OF:
            yield from ((name, setting, each) for setting, each in value.items())
        else:
            yield kind, name, value


def _default(section: str, name: str) -> dict[str, object]:
    field = _SETTINGS_OF[section].model_fields.get(name) if section in _SETTINGS_OF else None
    usual = json.dumps(field.get_default(call_default_factory=True)) if field and not field.is_required() else None
    return {"usual": usual, "about": field.description if field else None}


def _number_or_none(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
