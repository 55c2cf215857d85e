"""Rules as labels: what `labels/SAE/rules.csv` holds, which rows still hold, and which must go.

A rule may quote the corpus. Each row's `state` therefore says what it was made from: eight digits for the values and
the method, eight for the documents that were hidden then. `forget` removes rows made when fewer were hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saeflow.features.schema import EXPLANATION_MISTAKES, holding
from saeflow.meaning.beside_labels import changing_beside, path_beside, replace_rows
from saeflow.meaning.token_rules.choose import Rule
from saeflow.query.labels import RULES_SOURCE, Label, put, read_cells
from saeflow.query.run_records import UNREADABLE_RECORD
from saeflow.recipe.fingerprint import fingerprint
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store

METHOD = 2
"""Counts up when other rules or mistakes would follow from equal values. Rows of an earlier method are made again."""

_BY_RULE = {"model": "", "method": "rule"}
"""How mistakes of rules differ from those that a language model made with the same source of labels."""

SIMPLE = 0.5
"""Held-out F1 from which a rule is called one."""


def state_of_rules(store: Store, run: Artefact) -> str:
    """Return the state of rules that are made from this run now."""
    values = fingerprint({"run": run.id, "values": holding(run.published().parts), "method": METHOD})
    return f"{values}-{_hidden_in(store, run)}"


def _hidden_in(store: Store, run: Artefact) -> str:
    tokens = store.input_of(run, "tokens")
    return fingerprint({"tokens": tokens.id, "hidden": tokens.published().hidden_ids})


def finished(store: Store, sae: str, state: str) -> set[int]:
    """Return the features whose rule is of this state."""
    return {feature for feature, cell in read_cells(store, sae, RULES_SOURCE, "state").items() if cell == state}


def stored_features(store: Store, sae: str) -> set[int]:
    """Return the features that have a rule of any state."""
    return {feature for feature, cell in read_cells(store, sae, RULES_SOURCE, "state").items() if cell}


def save(store: Store, run: Artefact, sae: str, state: str, rules: Sequence[Rule], dead: Iterable[int] = ()) -> None:
    """Write rules; features that are `dead` have none. Their mistakes go first: a rule that is there has its own."""
    labels: dict[int, Label | None] = dict.fromkeys(dead)
    labels |= {rule.feature_id: _label_of_rule(rule, state) for rule in rules}
    tokens = store.input_of(run, "tokens").id
    _put_mistakes(store, sae, labels, [row | {"tokens": tokens} for rule in rules for row in _mistakes(rule)])
    put(store, sae, RULES_SOURCE, labels)


def _put_mistakes(store: Store, sae: str, features: Iterable[int], rows: Iterable[Mapping[str, Any]]) -> None:
    name = sae.removeprefix("saes/")
    path = path_beside(store, name, RULES_SOURCE, "mistakes")
    with changing_beside(store, name, RULES_SOURCE):
        replace_rows(store, path, EXPLANATION_MISTAKES, features, {"method": _BY_RULE["method"]}, rows)


def _mistakes(rule: Rule) -> list[dict[str, Any]]:
    common = {"feature_id": rule.feature_id, **_BY_RULE}
    missed = [{"stratum": "strongest", "token_id": token, "asked": True, "answered": False} for token in rule.missed]
    alarms = [{"stratum": "random", "token_id": token, "asked": False, "answered": True} for token in rule.false_alarms]
    return [common | row for row in missed + alarms]


def _label_of_rule(rule: Rule, state: str) -> Label:
    counted = rule.held_out
    figures = {"precision": counted.precision, "recall": counted.recall}
    cells = {name: "" if figure is None else repr(figure) for name, figure in figures.items()}
    cells |= {"rule": rule.text, "kind": rule.kind, "state": state}
    return Label(rule_in_words(rule), counted.f1, cells)


def rule_in_words(rule: Rule) -> str:
    """Return the label that a rule gives its feature."""
    counted = rule.held_out
    if counted.f1 is None:
        return "not tested, it fires at no held-out token" + (f" (rule: {rule.text})" if rule.text else "")
    if counted.f1 < SIMPLE:
        return f"no simple rule (best F1 {counted.f1:.2f})"
    return f"{rule.text} (precision {counted.precision:.2f}, recall {counted.recall:.2f})"


def remove_outdated(store: Store) -> dict[str, int]:
    """Remove rules made when other documents were hidden than are now: they may quote forgotten ones.

    Return how many rules each SAE lost. Rows without a state were not made by saeflow, and stay.
    """
    lost = {}
    folders = store.storage.names_in(store.root / "labels")
    for sae in sorted(name for name in folders if _has_rules(store, name)):
        current = {hidden for run in store.artefacts("features") if (hidden := _hidden_if_of(store, run, sae))}
        states = read_cells(store, sae, RULES_SOURCE, "state")
        outdated = [feature for feature, state in states.items() if state and state.partition("-")[2] not in current]
        if outdated:
            put(store, sae, RULES_SOURCE, dict.fromkeys(outdated))
            _put_mistakes(store, sae, outdated, [])
            lost[f"saes/{sae}"] = len(outdated)
    return lost


def _has_rules(store: Store, sae: str) -> bool:
    return store.storage.size(f"{store.root}/labels/{sae}/{RULES_SOURCE}.csv") is not None


def _hidden_if_of(store: Store, run: Artefact, sae: str) -> str | None:
    """Return what is hidden in the tokens of a run of this SAE; None for another run, and for one that is damaged."""
    try:
        return _hidden_in(store, run) if run.record.input("saes") == f"saes/{sae}" else None
    except UNREADABLE_RECORD:
        return None


def share_of_rules(rules: Sequence[float | None], least: float) -> float:
    """Return the share of held-out F1s that are at least so large; features that were not tested count as below."""
    return sum(f1 is not None and f1 >= least for f1 in rules) / max(1, len(rules))
