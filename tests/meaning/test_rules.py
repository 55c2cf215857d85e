"""Rules: planted features get exactly their rule, figures equal slow counts, and nothing forgotten stays in them."""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.features.schema import EXPLANATION_MISTAKES
from saeflow.meaning.beside_labels import path_beside, replace_rows
from saeflow.meaning.token_rules import counting, explain, stored, testing, token_table
from saeflow.meaning.token_rules.counting import MOST_KEYS, N_LEVELS, PRICE, Firings, Unions
from saeflow.meaning.token_rules.firings import plan_chunks
from saeflow.meaning.token_rules.wording import quoted
from saeflow.pipeline.lifecycle.forget import forget
from saeflow.query.ask import ask, query
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from saeflow.runtime.errors import UserError
from saeflow.store.records import Hidden
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.small_pipeline import quiet
from tests.support.small_store import Document, Given

SAE = "saes/demo-f0000001"
HOSTILE = " \x1b[31mred\n"
WORDS = [
    f" {word}"
    for word in (
        *("the", "of", "cat", "dog", "ran", "home", "under", "unto", "undo", "unit", "upper", "up"),
        *("1", "22", "333", "44", "55", "66", "777", "Mary", "Tom", "Ann"),
    )
]
PIECES = [*WORDS, " Bob", " Eve", " Jim", " Sue", ",", ".", "\n", "ly", HOSTILE]
N_DOCUMENTS, N_TOKENS = 40, 60


def planted_documents() -> list[Document]:
    """Documents of random pieces, in which only " cat" often follows " the"."""
    dice = random.Random(0)
    found = []
    for i in range(N_DOCUMENTS):
        pieces: list[str] = []
        while len(pieces) < N_TOKENS:
            pieces += [" the", " cat"] if dice.random() < 0.05 else [dice.choice(PIECES)]
        source = ("tales", "letters")[i % 2]
        found.append(Document(f"{source}/{i}", source, [piece.encode() for piece in pieces[:N_TOKENS]]))
    return found


Spot = tuple[str, str | None, int, str]
"""A token, the one before it in its sequence, its place in the sequence, and its source."""

PLANTED: list[tuple[str, str, Callable[[Spot], bool]]] = [
    ('" the"', "token", lambda spot: spot[0] == " the"),
    ('after " of"', "after", lambda spot: spot[1] == " of"),
    ("digits", "shape", lambda spot: spot[0].strip().isdigit()),
    ('" cat" or " dog"', "token", lambda spot: spot[0] in (" cat", " dog")),
    ('" cat" after " the"', "n-gram", lambda spot: spot[:2] == (" cat", " the")),
    ("a capitalised word", "shape", lambda spot: spot[0].strip().istitle()),
    ("after punctuation", "after shape", lambda spot: spot[1] in (",", ".")),
    ("position 0 of a sequence", "position", lambda spot: spot[2] == 0),
    ('source "tales"', "source", lambda spot: spot[3] == "tales"),
    ('begins with " un"', "begins", lambda spot: spot[0].startswith(" un") and len(spot[0]) > 3),
    (quoted(HOSTILE), "token", lambda spot: spot[0] == HOSTILE),
    ('" ran" in source "letters"', "token in source", lambda spot: spot[0] == " ran" and spot[3] == "letters"),
    ('" home"; or after ","', "token + after", lambda spot: spot[0] == " home" or spot[1] == ","),
]
RANDOM, NOISY, RARE, DEAD = range(len(PLANTED), len(PLANTED) + 4)


def spots(documents: list[Document]) -> list[Spot]:
    found: list[Spot] = []
    for document in documents:
        for place, piece in enumerate(document.pieces):
            position = len(found) % 4
            before = document.pieces[place - 1].decode() if place and position else None
            found.append((piece.decode(), before, position, document.source or ""))
    return found


def planted() -> Given:
    """The planted features; then one that fires at random, a noisy one, one that is silent held out, a dead one."""
    documents, dice = planted_documents(), random.Random(1)
    every = spots(documents)
    values = [(t, f, 1.0) for t, spot in enumerate(every) for f, (_, _, fires) in enumerate(PLANTED) if fires(spot)]
    values += [(t, RANDOM, 1.0) for t in range(len(every)) if dice.random() < 0.1]
    values += [
        (t, NOISY, dice.choice((0.5, 1.0, 2.0)))
        for t, spot in enumerate(every)
        if dice.random() < (0.8 if spot[0] == " the" else 0.02)
    ]
    values += [(t, RARE, 1.0) for t in (61, 65, 70)]
    stats = [
        {
            "feature_id": f,
            "n_tokens": sum(v[1] == f for v in values),
            "sum_value": 0.0,
            "sum_squares": 0.0,
            "max_value": 1.0,
        }
        for f in range(DEAD + 1)
    ]
    held_out = pa.array([i % 5 == 0 for i in range(N_DOCUMENTS)], pa.bool_())
    return Given(
        documents=documents, values=sorted(values), metadata={"held_out": held_out}, tables={"feature_stats": stats}
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted().write(tmp_path_factory.mktemp("planted") / "store").root


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Store:
    subprocess.run(["cp", "-r", str(written), str(tmp_path / "store")], check=True)
    return Store.open(tmp_path / "store")


@pytest.fixture(scope="module")
def explained(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    place = tmp_path_factory.mktemp("explained") / "store"
    subprocess.run(["cp", "-r", str(written), str(place)], check=True)
    explain.explain_run(Store.open(place), None, None, False, quiet(), threads=1)
    return Store.open(place)


def rules(store: Store) -> dict[int, dict[str, object]]:
    with connect(store, threads=1, names=["feature_rules"]) as connection:
        return {row["feature_id"]: row for row in ask(connection, "feature_rules").to_pylist()}


def csv_of(store: Store) -> Path:
    return store.root / "labels" / "demo-f0000001" / "rules.csv"


def mistakes_of(store: Store) -> Path:
    return csv_of(store).with_name("rules.mistakes.parquet")


@pytest.fixture(scope="module")
def found(explained: Store) -> dict[int, dict[str, object]]:
    return rules(explained)


@pytest.mark.parametrize("feature", range(len(PLANTED)), ids=[text for text, _, _ in PLANTED])
def test_a_planted_feature_gets_exactly_its_rule(found: dict[int, dict[str, object]], feature: int) -> None:
    text, kind, _ = PLANTED[feature]
    row = found[feature]
    assert (row["rule"], row["kind"]) == (text, kind)
    assert (row["precision"], row["recall"], row["f1"]) == (1, 1, 1)


def test_a_feature_that_fires_at_random_has_no_simple_rule(explained: Store) -> None:
    found = rules(explained)[RANDOM]
    with connect(explained, threads=1, names=["feature_labels"]) as connection:
        labels = {row["feature_id"]: row for row in ask(connection, "feature_labels").to_pylist()}
    assert found["f1"] < 0.5
    assert labels[RANDOM]["label"] == f"no simple rule (best F1 {found['f1']:.2f})"
    assert labels[0]["label"] == '" the" (precision 1.00, recall 1.00)'
    assert (labels[0]["source"], labels[0]["score"]) == ("rules", 1)
    assert labels[RARE]["label"].startswith("not tested, it fires at no held-out token")
    assert labels[RARE]["score"] is None
    assert DEAD not in labels


def test_figures_equal_a_slow_count_over_all_held_out_tokens(explained: Store) -> None:
    data = planted()
    every = spots(data.documents)
    held_out = {t for t in range(len(every)) if t // N_TOKENS % 5 == 0}
    fired = {t for t, feature, _ in data.values if feature == NOISY} & held_out
    said = {t for t in held_out if every[t][0] == " the"}
    hits = len(fired & said)
    row = rules(explained)[NOISY]
    assert row["rule"] == '" the"'
    assert (row["precision"], row["recall"]) == (hits / len(said), hits / len(fired))
    assert row["f1"] == pytest.approx(2 * hits / (len(said) + len(fired)), rel=1e-15)


def mistakes(store: Store, feature: int) -> list[tuple[int, bool, str]]:
    with connect(store, threads=1, names=["explanation_mistakes"]) as connection:
        found = ask(connection, "explanation_mistakes", [feature]).to_pylist()
    assert {(row["source"], row["model"], row["method"]) for row in found} <= {("rules", None, "rule")}
    assert all(row["answered"] is not row["asked"] for row in found)
    return [(row["token_id"], row["asked"], row["stratum"]) for row in found]


def test_a_rule_says_the_strongest_firings_it_misses_and_some_tokens_where_it_is_wrong(explained: Store) -> None:
    data = planted()
    every = spots(data.documents)
    held_out = {t for t in range(len(every)) if t // N_TOKENS % 5 == 0}
    values = {t: value for t, feature, value in data.values if feature == NOISY and t in held_out}
    said = {t for t in held_out if every[t][0] == " the"}
    found = mistakes(explained, NOISY)
    missed = sorted(values.keys() - said, key=lambda t: (-values[t], t))[: testing.MOST_MISTAKES]
    assert [row for row in found if row[1]] == [(t, True, "strongest") for t in sorted(missed)]
    alarms = [t for t, fires, stratum in found if not fires and stratum == "random"]
    assert len(alarms) == testing.MOST_MISTAKES < len(said - values.keys())
    assert set(alarms) < said - values.keys()
    assert mistakes(explained, 0) == []


def test_mistakes_of_a_rule_go_with_it_and_those_of_a_language_model_stay(explained: Store, store: Store) -> None:
    explain.explain_run(store, None, f"{NOISY},{RANDOM}", False, quiet(), threads=1)
    tokens = store.artefacts("tokens")[0].id
    other = {"feature_id": NOISY, "model": "judge", "tokens": tokens, "method": "detection", "stratum": "random"}
    row = other | {"token_id": 7, "asked": False, "answered": True}
    path = path_beside(store, SAE.removeprefix("saes/"), "rules", "mistakes")
    replace_rows(store, path, EXPLANATION_MISTAKES, [NOISY], {"model": "judge"}, [row])
    explain.explain_run(store, None, str(NOISY), True, quiet(), threads=1)
    assert {row["model"] for row in pq.read_table(path).to_pylist()} == {"", "judge"}
    hide(store, 3)
    stored.remove_outdated(store)
    assert pq.read_table(path).to_pylist() == [row]


def test_no_text_of_the_corpus_reaches_a_label_with_what_a_terminal_obeys(explained: Store) -> None:
    text = csv_of(explained).read_text("utf-8")
    assert "\x1b" not in text
    assert len(text.splitlines()) == 1 + DEAD
    assert quoted('a\t"b"\n\u202e') == r'"a\t\"b\"\n⟨U+202E⟩"'
    assert len(quoted("x" * 999)) < 70


def test_run_again_does_nothing_and_with_again_gives_equal_bytes(explained: Store) -> None:
    before, time = csv_of(explained).read_bytes(), csv_of(explained).stat().st_mtime_ns
    wrong = mistakes_of(explained).read_bytes()
    progress = quiet()
    progress.say = lambda text, verbosity=0: pytest.fail(f"it begins: {text}")  # type: ignore[method-assign]
    assert explain.explain_run(explained, None, None, False, progress).n_made == 0
    assert csv_of(explained).stat().st_mtime_ns == time
    assert explain.explain_run(explained, None, None, True, quiet(), threads=2).n_made == DEAD
    assert csv_of(explained).read_bytes() == before
    assert mistakes_of(explained).read_bytes() == wrong


KILLED = """
import os, signal, sys
from saeflow.meaning.token_rules import explain, stored
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store
plan, save, n = explain.plan_chunks, stored.save, 0
explain.plan_chunks = lambda missing, counts: plan(missing, counts, most_features=5)
def dying(*arguments):
    global n
    n += 1
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments)
stored.save = dying
explain.explain_run(Store.open(sys.argv[1]), None, None, False, Progress(verbosity=-1), 1)
"""


@pytest.mark.long
def test_a_killed_call_goes_on_where_it_stopped_and_equals_an_undisturbed_one(explained: Store, store: Store) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.root)], env={**os.environ}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(rules(store)) == list(range(10))
    assert explain.explain_run(store, None, None, False, quiet(), threads=1).n_made == DEAD - 10
    assert csv_of(store).read_bytes() == csv_of(explained).read_bytes()
    assert mistakes_of(store).read_bytes() == mistakes_of(explained).read_bytes()


def test_the_command_says_shares_and_the_rules_that_were_asked_for(saeflow: Command, store: Store) -> None:
    said = saeflow("explain", "--features", f"0,{DEAD}", "--store", store.root)
    assert said.code == 0, said.err
    assert '" the"' in said.out
    assert f"Feature {DEAD} never fires." in said.out
    assert "1 live features: 100.0% a rule of F1 ≥ 0.8, 100.0% a rule of F1 ≥ 0.5 on held-out tokens." in said.out
    assert list(rules(store)) == [0]
    assert "demo-f0000001/rules.csv" in saeflow("explain", "--features", "1-3", "--store", store.root).out
    wrong = saeflow("explain", "--features", "3-99", "--store", store.root)
    assert (wrong.code, wrong.err.splitlines()[-1]) == (2, f"--features has '3-99', but features go from 0 to {DEAD}.")


def test_labels_of_people_and_of_other_tools_are_shown_instead_of_a_rule(explained: Store, store: Store) -> None:
    put(store, SAE, "rules", {0: Label("rule", 0.99), 1: Label("rule", 0.99), 2: Label("rule", 0.99)})
    put(store, SAE, "own", {0: Label("mine")})
    put(store, SAE, "gpt", {0: Label("guess", 0.9), 1: Label("guess", 0.1)})
    with connect(store, threads=1) as connection:
        shown = ask(connection, "feature_summary").column("label").to_pylist()
        listed = query(connection, "select label from feature_labels where feature_id = 0").column(0).to_pylist()
    assert shown[:3] == ["mine", "guess", "rule"]
    assert listed == ["mine", "guess", "rule"]


def hide(store: Store, document: int) -> None:
    tokens = store.artefacts("tokens")[0]
    with tokens.writing():
        mine = Hidden(document_id=document, key_hash="0", reason="forgotten")
        tokens.publish(tokens.published().parts, hidden={0: (mine,)})


def test_rules_that_may_quote_a_forgotten_document_are_removed_and_others_stay(store: Store) -> None:
    explain.explain_run(store, None, "0-3", False, quiet(), threads=1)
    put(store, SAE, "rules", {RARE: Label("by hand")})
    put(store, "saes/other-00000000", "rules", {1: Label("a rule", 0.9, {"state": "00000000-00000000"})})
    assert stored.remove_outdated(store) == {"saes/other-00000000": 1}
    hide(store, 3)
    assert stored.remove_outdated(store) == {SAE: 4}
    assert [row[:2] for row in csv.reader(csv_of(store).read_text().splitlines()[1:])] == [[str(RARE), "by hand"]]


def test_forget_removes_the_rules_of_a_real_run_and_says_so(finished: Finished, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(finished.store.root), str(tmp_path / "real")], check=True)
    copied, said = Store.open(tmp_path / "real"), list[str]()
    progress = quiet()
    progress.say = lambda text, verbosity=0: said.append(text)  # type: ignore[method-assign]
    made = explain.explain_run(copied, None, None, False, quiet(), threads=1)
    path = copied.root / "labels" / made.sae.removeprefix("saes/") / "rules.csv"
    assert len(path.read_text("utf-8").splitlines()) == 1 + made.n_made
    forget(copied, ["tales/002"], progress)
    assert not path.exists()
    assert f"{made.sae}: {made.n_made} rules removed, as they may quote these documents" in "".join(said)
    assert explain.explain_run(copied, None, None, False, quiet(), threads=1).n_made > 0


def test_documents_forgotten_while_rules_are_chosen_leave_no_rule_behind(store: Store) -> None:
    progress = quiet()
    progress.say = lambda text, verbosity=0: hide(store, 3)  # type: ignore[method-assign]  # once tokens are read
    with pytest.raises(UserError, match="has changed meanwhile"):
        explain.explain_run(store, None, "0-3", False, progress, threads=1)
    assert not csv_of(store).exists()


def test_without_held_out_documents_a_fifth_of_the_documents_is_and_each_document_is_whole(tmp_path: Path) -> None:
    data = planted()
    data.metadata = {}
    with connect(data.write(tmp_path / "store"), threads=1, names=token_table.TOKEN_TABLES) as connection:
        table = token_table.read_token_table(connection)
    sides = table.sides[: N_DOCUMENTS * N_TOKENS].reshape(N_DOCUMENTS, N_TOKENS)
    assert (sides == sides[:, :1]).all()
    assert table.split == "a fifth of the documents"
    assert 0.05 < (sides == token_table.HELD_OUT).mean() < 0.4


def best_by_trying(fired: int, counts: list[int], sizes: list[int], hits: int = 0, size: int = 0) -> float:
    """The best F1 less its price over all unions, one by one."""
    best = 0.0
    usable = [k for k, count in enumerate(counts) if count >= 2]
    for n in range(MOST_KEYS + 1):
        for keys in itertools.combinations(usable, n):
            inner, outer = hits + sum(counts[k] for k in keys), size + sum(sizes[k] for k in keys)
            best = max(best, 2 * inner / max(1, fired + outer) - PRICE * max(0, n - 1))
    return best


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(-1, 5), min_size=1, max_size=80),
    seed=st.integers(0, 99),
    beside=st.booleans(),
)
def test_the_best_union_is_the_best_of_all_unions(keys: list[int], seed: int, beside: bool) -> None:
    n, dice = len(keys), np.random.default_rng(seed)
    own, other = np.array(keys, np.int32), dice.integers(-1, 2, n).astype(np.int32)
    token_ids = np.flatnonzero(dice.random(n) < 0.5).astype(np.int32)
    sizes = np.zeros((N_LEVELS, 6), np.int32)
    levels = np.ones(n, np.uint8)
    counting.count_training(own, levels, sizes)
    found = Unions(np.full((1, MOST_KEYS), -1, np.int32), np.zeros(1))
    starts, listed = np.zeros(3, np.int64), np.empty(int((other >= 0).sum()), np.int32)
    counting.index_keys(other, np.arange(n, dtype=np.int32), starts, listed)
    first = np.array([[0]], np.int32) if beside else np.empty((1, 0), np.int32)
    firings = Firings(np.array([0]), np.array([len(token_ids)]), token_ids, np.ones(len(token_ids), np.float32))
    counting.best_unions(
        firings, levels, np.zeros(1, np.uint8), own, sizes, np.empty((1, 0), np.int32), PRICE, other, first, starts,
        listed, found,
    )  # fmt: skip
    covered = (other == 0) & beside
    free = token_ids[~covered[token_ids]]
    counts = [int((own[free] == k).sum()) for k in range(6)]
    outside = [int(((own == k) & ~covered).sum()) for k in range(6)]
    hits, size = len(token_ids) - len(free), int(covered.sum())
    alone = 2 * hits / max(1, len(token_ids) + size)
    best = best_by_trying(len(token_ids), counts, outside, hits, size)
    chosen = [int(k) for k in found.keys[0] if k >= 0]
    inner, outer = hits + sum(counts[k] for k in chosen), size + sum(outside[k] for k in chosen)
    net = 2 * inner / max(1, len(token_ids) + outer) - PRICE * max(0, len(chosen) - 1)
    if chosen:
        assert net == pytest.approx(float(found.score[0]), abs=1e-12)
    assert net >= best - PRICE * MOST_KEYS - 1e-12  # prices are taken off the best union, not searched with
    assert net >= min(alone, best) - 1e-12


def test_a_feature_that_fires_often_is_looked_at_in_a_sample_of_whole_stretches() -> None:
    n = 400_128
    levels = counting.sample_levels(np.full(n, token_table.TRAINING, np.uint8))
    assert (levels.reshape(-1, counting.STRETCH) == levels[:: counting.STRETCH, None]).all()
    for level in range(1, 4):
        assert (levels > level).mean() == pytest.approx(0.5**level, rel=0.2)
    token_ids = np.concatenate([np.arange(n), np.arange(9)]).astype(np.int32)
    firings = Firings(np.array([0, n]), np.array([n, n + 9]), token_ids, np.arange(n + 9, dtype=np.float32))
    samples = counting.choose_samples(firings, levels)
    assert samples[1] == 0
    part = counting.select_firings(firings, levels, samples + np.uint8(1), N_LEVELS)
    assert counting.MOST_FIRINGS / 4 < part.ends[0] - part.starts[0] <= counting.MOST_FIRINGS
    assert part.ends[1] - part.starts[1] == 9
    assert (part.token_ids == token_ids[part.values.astype(int)]).all()


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=40), most=st.integers(1, 60), size=st.integers(1, 9))
def test_chunks_hold_every_feature_once_and_no_more_values_than_fit(counts: list[int], most: int, size: int) -> None:
    chunks = plan_chunks(range(len(counts)), np.array(counts), most, size)
    assert [feature for chunk in chunks for feature in chunk] == list(range(len(counts)))
    for chunk in chunks:
        assert len(chunk) <= size
        assert len(chunk) == 1 or sum(counts[feature] for feature in chunk) <= most
