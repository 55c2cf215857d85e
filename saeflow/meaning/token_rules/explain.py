"""Explain a run's features by simple rules, and write them as labels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np

from saeflow.meaning.feature_list import parse_features
from saeflow.meaning.token_rules import firings, stored, token_table
from saeflow.meaning.token_rules.choose import Chooser, Rule
from saeflow.meaning.token_rules.families import make_families
from saeflow.meaning.token_rules.firings import count_firings, plan_chunks, read_firings
from saeflow.query import catalog
from saeflow.query.connection import connect_to_run
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.sae.kernels import Ids
from saeflow.store.store import Store

_READ_FROM = (*token_table.TOKEN_TABLES, *firings.FIRING_TABLES, "stg_logits")


@dataclass(frozen=True)
class ExplainedRun:
    """What a call of `explain_run` found and made."""

    run: str
    """The run's name in SQL."""
    sae: str
    features: list[int]
    """Live features that were asked for."""
    dead: list[int]
    """Features that were asked for by number and never fire."""
    n_made: int
    """Rules that this call chose; the others were there."""
    split: str = ""
    """How tokens were held out, in words; empty if no rule was chosen."""


def explain_run(
    store: Store, run: str | None, features: str | None, again: bool, progress: Progress, threads: int = 0
) -> ExplainedRun:
    """Choose a rule for each live feature that has none from the present values, or `again` for all.

    Rules are written a range of features at a time, so a killed call goes on where it stopped. Raises UserError for an
    unknown run or feature, for tokens that do not fit into memory, and if documents are forgotten meanwhile.
    """
    chosen, connection = connect_to_run(store, run, names=_READ_FROM)
    with contextlib.closing(connection):
        sae = chosen.artefact.record.input("saes")
        if sae is None:
            raise UserError(f"{chosen.artefact.id} does not say which SAE its features belong to.")
        counts = count_firings(connection)
        wanted = range(len(counts)) if features is None else parse_features(features, len(counts))
        live = [feature for feature in wanted if counts[feature]]
        dead = [feature for feature in wanted if not counts[feature]]
        work = _RuleMaking(store, chosen, sae, stored.state_of_rules(store, chosen.artefact), connection, counts)
        split = work.make(live, dead, again, progress, n_threads(threads))
    catalog.write_catalog(store)
    return ExplainedRun(chosen.schema, sae, live, dead if features else [], work.n_made, split)


@dataclass
class _RuleMaking:
    store: Store
    run: Run
    sae: str
    state: str
    connection: duckdb.DuckDBPyConnection
    counts: np.ndarray
    n_made: int = 0

    def make(self, live: Sequence[int], dead: Sequence[int], again: bool, progress: Progress, threads: int) -> str:
        """Choose and write the rules that are missing. Return how tokens were held out."""
        every = stored.stored_features(self.store, self.sae)
        if removed := [feature for feature in dead if feature in every]:
            self._save([], removed)
        done = set() if again else stored.finished(self.store, self.sae, self.state)
        missing = [feature for feature in live if feature not in done]
        if not missing:
            return ""
        table = token_table.read_token_table(self.connection)
        progress.say(f"rules: {table.n_on(1):,} tokens to choose on, {table.n_on(2):,} to test on: {table.split}")
        families = make_families(table, threads)
        chooser = Chooser(table, families, self._promoted(), threads)
        with progress.bar("rules", len(live), "features") as bar:
            bar.resume_at(len(live) - len(missing))
            for chunk in plan_chunks(missing, self.counts):
                found = read_firings(self.connection, chunk, self.counts, len(table.vocab_ids))
                self._save(chooser.rules(chunk, found))
                self.n_made += len(chunk)
                bar.advance(len(chunk))
        return table.split

    def _save(self, rules: Sequence[Rule], dead: Sequence[int] = ()) -> None:
        stored.save(self.store, self.run.artefact, self.sae, self.state, rules, dead)
        if stored.state_of_rules(self.store, self.run.artefact) != self.state:
            stored.remove_outdated(self.store)
            raise UserError(
                f"{self.run.artefact.id} has changed meanwhile. Run the same command again to explain it as it is now."
            )

    def _promoted(self) -> Ids:
        """Return (F, A) the entries that each feature makes the model say, -1 where there are fewer."""
        rows = self.connection.execute(
            "select feature_id, vocab_id, "
            "row_number() over (partition by feature_id order by logit desc, vocab_id) - 1 as place "
            "from stg_logits where logit > 0"
        ).fetchnumpy()
        features, entries, places = (np.ma.getdata(column).astype(np.int64) for column in rows.values())
        found = np.full((len(self.counts), max(1, int(places.max(initial=0)) + 1)), -1, np.int32)
        found[features, places] = entries
        return found
