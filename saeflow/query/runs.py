"""The runs of a store: which there are, which files each is made of, and why one cannot be read.

A run is one SAE with its feature values, and lies in `features/`. Only records are read here, no values.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from saeflow.corpus.selection import TokenSelection
from saeflow.corpus.token_parts import has_marks
from saeflow.features import beside
from saeflow.features.schema import (
    ORDERS,
    covered,
    has_every_table,
    has_sample,
    hidden_digest_of,
    indices_held,
    token_ranges,
)
from saeflow.query import run_records
from saeflow.query.files.by_table import files_by_table
from saeflow.query.files.chosen import FileRanges
from saeflow.query.files.looked_up import vocab_id_function
from saeflow.query.files.relations import condition_of_encoded, reason_to_skip
from saeflow.query.files.token_index import VocabIdFile, vocab_id_files
from saeflow.query.labels import LabelFile, TableBesideLabels, label_files, tables_beside_labels
from saeflow.query.run_records import UNREADABLE_RECORD
from saeflow.recipe.settings import SIGNED, TOP_FAMILY
from saeflow.runtime.errors import UserError
from saeflow.runtime.sql_errors import REPAIR
from saeflow.runtime.text import HOSTILE, brief, did_you_mean
from saeflow.store.artefact import Artefact
from saeflow.store.records import Damaged, Generation, PartRecord, read_checked
from saeflow.store.store import Store
from saeflow.store.verify import find_damage

log = logging.getLogger(__name__)

EVERY_RUN = "every_run"
"""The schema that holds what questions about several runs read."""

SQL_VOCAB_ID = (
    "select (held.vocab_ids[(token - held.first_token_id) * 4 + 1 : (token - held.first_token_id) * 4 + 4])"
    "::bit::integer from src_vocab_blocks as held where held.block_id = token // 512 "
    "and token between held.first_token_id and held.first_token_id + held.n_tokens - 1"
)
"""SQL on `token`: its vocabulary id, from the blocks."""

_RESERVED = {EVERY_RUN, "memory", "main", "temp", "system", "pg_catalog", "information_schema"}


class PartTokens(NamedTuple):
    """A part of the tokens, the folder of the run's part with its values, and its tokens: `first` to `end` - 1."""

    part: int
    folder: str
    first: int
    end: int


@dataclass(frozen=True)
class Run:
    """One run as SQL sees it: its schema, its files by table, and its problem if it cannot be read."""

    artefact: Artefact
    schema: str
    files: Mapping[str, Sequence[str]]
    facts: str | None = None
    quality: str | None = None
    n_tokens: int | None = None
    hidden: Sequence[int] = ()
    """Documents that were forgotten or replaced."""
    left_out: Sequence[tuple[int, int]] = ()
    """Ranges of token_id, both ends included, whose values are hidden until the tokens are encoded again."""
    shape: Mapping[str, int | None] = field(default_factory=dict)
    """Context length, number of features, whether every part has counts by source and position, and whether values
    may be below zero."""
    encoded: str = "true"
    """SQL on `token` and `entry`: true if the token was encoded, so that a missing value means a silent feature."""
    skip_reason: str = "null::varchar"
    """SQL on `token` and `entry`: why a setting leaves the token out, but for its length; null if none does."""
    roles: Sequence[str] = ()
    """Roles whose tokens alone were encoded; empty for all."""
    parts: Sequence[PartTokens] = ()
    """The encoded parts of the tokens, in order."""
    labels: Sequence[LabelFile] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Where the spans of the newest annotations lie, by name."""
    probes: Sequence[beside.ProbeFile] = ()
    beside_labels: Sequence[TableBesideLabels] = ()
    is_whole: bool = False
    """True if every published part of the tokens is encoded."""
    model: str | None = None
    stages: Sequence[Mapping[str, object]] = ()
    """Rows of the view `stages`, the run itself last."""
    settings: Sequence[Mapping[str, object]] = ()
    problem: str | None = None
    n_documents: int | None = None
    """Documents with names, hidden ones too; None where the records do not say."""
    vocab_id_files: Sequence[VocabIdFile] | None = None
    """What a connection looks vocabulary ids up in; None if it must ask SQL."""
    number: int | None = None
    """The run's number in its connection, which names its functions and variables there."""

    @cached_property
    def value_files(self) -> dict[str, FileRanges]:
        """The files of values by order, to choose from."""
        return {order: FileRanges(self.files.get(order, ())) for order in ORDERS}

    @property
    def vocab_id_sql(self) -> str:
        """SQL on `token`: its vocabulary id."""
        return SQL_VOCAB_ID if self.looks_up is None else f"{vocab_id_function(self.looks_up)}(token)"

    @property
    def looks_up(self) -> int | None:
        """The run's number in a connection that has functions to look its tokens up; else None."""
        return None if self.vocab_id_files is None else self.number

    def is_called(self, name: str) -> bool:
        """True if the name means this run alone; the short name may mean several."""
        full_names = (f"{self.artefact.name}{sign}{self.artefact.fp}" for sign in "-_")
        return name in (self.schema, self.artefact.id, *full_names)

    def row(self, current: Run) -> dict[str, object]:
        """Return the run's row in the view `runs`."""
        return {
            "name": self.artefact.name,
            "fp": self.artefact.fp,
            "schema_name": self.schema,
            "is_current": self is current,
            "n_tokens": self.n_tokens,
            "is_whole": self.is_whole,
            "model": self.model,
            **{name: self.stages[-1][name] if self.stages else None for name in ("n_bytes", "written")},
            "tokens_artefact": self.artefact.record.input("tokens") if self.problem is None else None,
            "facts": self.facts,
            "quality": self.quality,
            "problem": self.problem,
        }


def runs(store: Store) -> list[Run]:
    """Return every run of the store, the newest first. A run that cannot be read says why in `problem`.

    The newest readable run of a name takes the name as its schema; the others take `name_fp`. DuckDB ignores case, so
    names that differ only in case count as one name.
    """
    found: list[Run] = []
    for artefact in reversed(store.artefacts("features")):
        taken = {run.schema.casefold() for run in found} | _RESERVED
        full_name = f"{artefact.name}_{artefact.fp}"
        full_names = (full_name, *(f"{full_name}_{number}" for number in range(2, len(found) + 3)))
        try:
            found.append(_read_run(store, artefact, _first_free([artefact.name, *full_names], taken)))
        except UNREADABLE_RECORD as error:
            schema = _first_free(full_names, taken)
            found.append(Run(artefact, schema, {}, problem=str(error) or type(error).__name__))
    return found


def _first_free(names: Iterable[str], taken: set[str]) -> str:
    return next(name for name in names if name.casefold() not in taken)


def pick_run(store: Store, every: Sequence[Run], name: str | None) -> Run:
    """Return the run of this name, or the newest, among those that `runs` found. Raises UserError."""
    readable = [run for run in every if run.problem is None]
    damaged = [run for run in every if run.problem is not None]
    if name is None:
        if readable:
            return readable[0]
        reasons = "".join(f"\n{run.artefact.id}: {run.problem}" for run in damaged)
        raise UserError(f"{store.name} has no run to ask. Make one: `saeflow run RECIPE`.{reasons}")
    for fits in (
        lambda run: run.schema == name,
        lambda run: run.is_called(name),
        lambda run: run.artefact.name == name,
    ):
        for run in filter(fits, readable):
            return run
    for run in damaged:
        if run.is_called(name) or run.artefact.name == name:
            raise UserError(f"The run {name} cannot be read: {run.problem}")
    hint = did_you_mean(name, [run.schema for run in readable])
    raise UserError(f"There is no run {brief(name)!r} in {store.name}. {hint}")


def run_of_parts(store: Store, artefact: Artefact, parts: Sequence[PartRecord]) -> Run:
    """Return a run made of these parts alone, published or not, and of their tokens. Raises Damaged."""
    tokens = store.input_of(artefact, "tokens")
    generation = tokens.published()
    known = {index for part in parts for index in indices_held(part)}
    token_parts = [part for part in generation.parts if part.index in known]
    for owner, each in [(artefact, parts), (tokens, token_parts)]:
        for problem in (found for part in each for found in owner.missing_files(owner.part_path(part), part.files)):
            raise Damaged(f"{problem}\n{REPAIR}")
    _refuse_lost_vocabulary(store, artefact, tokens)
    return Run(
        artefact,
        artefact.name,
        files_by_table(artefact, parts, tokens, token_parts),
        facts=json.dumps(artefact.record.facts),
        hidden=generation.hidden_ids,
        shape=_shape(artefact, tokens, parts),
    )


def _read_run(store: Store, artefact: Artefact, schema: str) -> Run:
    if HOSTILE.search(artefact.id) or not artefact.id.isprintable():
        raise UserError("its name holds characters that a terminal obeys")
    source, sae = artefact.record.input("tokens"), artefact.record.input("saes")
    if source is None:
        raise UserError(f"{artefact.id} does not say which tokens it belongs to")
    tokens = store.by_id(source)
    generation = tokens.published()
    shown = _shown_parts(artefact, generation)
    files = files_by_table(artefact, shown, tokens, generation.parts)
    files["training_log"] = run_records.log_of(run_records.ancestors(store, artefact))
    files |= beside.effect_files(store, artefact.id)
    _refuse_damage(store, artefact, tokens, files)
    quality = artefact.path / "quality.json"
    n_tokens = sum(part.counts.get("n_tokens", 0) for part in shown) or generation.total("n_tokens")
    return Run(
        artefact,
        schema,
        files,
        facts=json.dumps(artefact.record.facts | _facts_of_sae(store, artefact)),
        quality=json.dumps(read_checked(quality)) if quality.is_file() else None,
        n_tokens=n_tokens or None,
        hidden=generation.hidden_ids,
        left_out=_hidden_ranges(shown, tokens, generation),
        parts=_part_tokens(shown, tokens, generation),
        shape=_shape(artefact, tokens, shown),
        **_conditions(artefact, shown, tokens, generation),
        roles=artefact.record.facts.get("roles", ()),
        labels=label_files(store, sae) if sae else (),
        annotations=beside.span_files(store, source),
        probes=beside.probe_files(store, artefact.id),
        beside_labels=tables_beside_labels(store, sae) if sae else (),
        n_documents=generation.total("n_documents"),
        vocab_id_files=vocab_id_files(tokens, generation),
        is_whole={part.index for part in generation.parts} <= {i for part in shown for i in _fresh(part, generation)},
        **_recorded(store, artefact),
    )


def _recorded(store: Store, artefact: Artefact) -> dict[str, Any]:
    made = run_records.ancestors(store, artefact)
    return {
        "model": run_records.model_of(made),
        "stages": run_records.stages(made),
        "settings": run_records.settings(made),
    }


def _refuse_damage(store: Store, artefact: Artefact, tokens: Artefact, files: Mapping[str, Sequence[str]]) -> None:
    for item in (artefact, tokens):
        item.look_once(partial(_raise_damage, item))
    values = ORDERS if artefact.published().total("n_values") else ()
    for table in (*values, "feature_stats", "tokens", "documents"):
        if not files[table]:
            raise UserError(f"{artefact.id} has no {table} files")
    tokens.storage.look_once(f"{tokens.id} vocabulary", lambda: _refuse_lost_vocabulary(store, artefact, tokens))


def _raise_damage(artefact: Artefact) -> None:
    for found in find_damage(artefact, full=False):
        raise UserError(found.problem)


def _refuse_lost_vocabulary(store: Store, artefact: Artefact, tokens: Artefact) -> None:
    if store.storage.size(f"{tokens.path}/vocab.parquet") is None:  # early records do not name it
        raise UserError(f"{artefact.id} has no vocab.parquet")


def _shape(artefact: Artefact, tokens: Artefact, shown: Sequence[PartRecord]) -> dict[str, int | None]:
    return {
        "context_length": tokens.record.facts.get("context_length"),
        "n_features": artefact.record.facts.get("n_features"),
        "has_marginals": all(map(has_every_table, shown)),
        "has_sample": all(map(has_sample, shown)),
        "has_offsets": all(map(has_marks, tokens.published().parts)),
        "is_signed": artefact.record.facts.get("architecture") in SIGNED,
    }


def _facts_of_sae(store: Store, artefact: Artefact) -> dict[str, Any]:
    """Return the SAE's architecture and the k that was asked for, as far as its record says."""
    for sae in (store.by_id(name) for name in artefact.record.inputs if name.startswith("saes/")):
        with contextlib.suppress(*UNREADABLE_RECORD):
            facts = sae.record.facts
            architecture = facts["sae"]["architecture"]
            aims = architecture == "jumprelu" and facts["sae"].get("penalty", "l0") == "l0" and "imported" not in facts
            has_k = architecture in TOP_FAMILY or aims
            return {"architecture": architecture, "k": facts["sae"]["k"] if has_k else None}
    return {}


def _shown_parts(artefact: Artefact, tokens: Generation) -> list[PartRecord]:
    """Return the run's parts, without those whose values all predate the removal of a document they hold."""
    every = artefact.published().parts
    stale = {part.folder: _stale(part, tokens) for part in every}
    shown = [part for part in every if len(stale[part.folder]) < len(indices_held(part))]
    n_stale = sum(map(len, stale.values()))
    if n_stale:
        log.warning(
            "%s: %d parts are left out, because they hold documents that were forgotten or replaced since. "
            "Encode them again: saeflow encode RECIPE",
            artefact.id,
            n_stale,
        )
    return shown


def _stale(part: PartRecord, tokens: Generation) -> list[int]:
    """Return the activation parts in which documents were hidden after this part's values were written."""
    return [i for i, digest in covered(part).items() if hidden_digest_of(digest) != tokens.hidden_digest(i)]


def _fresh(part: PartRecord, tokens: Generation) -> set[int]:
    """Return the activation parts that this part holds as they are now."""
    return covered(part).keys() - set(_stale(part, tokens))


def _hidden_ranges(shown: Iterable[PartRecord], tokens: Artefact, generation: Generation) -> list[tuple[int, int]]:
    """Return ranges of token_id, both ends included, that are stale inside a compacted part."""
    length = int(tokens.record.facts.get("context_length", 1))
    counts = {part.index: part.counts for part in generation.parts}
    stale = sorted(i for part in shown for i in _stale(part, generation) if i in counts)
    first = {i: counts[i]["first_sequence"] * length for i in stale}
    return [(first[i], first[i] + counts[i]["n_sequences"] * length - 1) for i in stale]


def _part_tokens(shown: Iterable[PartRecord], tokens: Artefact, generation: Generation) -> list[PartTokens]:
    """Return the parts of the tokens whose values are shown, in order; without those whose records lack the places."""
    length = int(tokens.record.facts.get("context_length", 1))
    counts = {part.index: part.counts for part in generation.parts if "first_sequence" in part.counts}
    found = []
    for part in shown:
        for index in covered(part).keys() & counts.keys():
            first = counts[index]["first_sequence"] * length
            found.append(PartTokens(index, part.folder, first, first + counts[index]["n_sequences"] * length))
    return sorted(found)


def _conditions(
    artefact: Artefact, shown: Sequence[PartRecord], tokens: Artefact, generation: Generation
) -> dict[str, Any]:
    """Return `encoded` and `skip_reason` of a run: tokens added since and those with hidden values are not encoded."""
    length = int(tokens.record.facts.get("context_length", 1))
    known = (i for part in shown for i in _fresh(part, generation))
    skips = TokenSelection.from_facts(tokens, artefact.record.facts)
    settings = length, skips.skip_positions, skips.special.tolist()
    ranges = token_ranges(known, generation.parts, length)
    return {"encoded": condition_of_encoded(ranges, *settings), "skip_reason": reason_to_skip(*settings)}
