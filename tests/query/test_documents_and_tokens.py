"""Questions about a document, a vocabulary entry and a pair of features, against each token looked at in turn."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saeflow.query.ask import ask
from saeflow.query.connection import connect
from tests.query.test_filtered_answers import Ask, Filter, filters
from tests.query.test_first_answers import Slow, worlds
from tests.support.part_tables import peak
from tests.support.small_store import Document, Given


def document_tokens(filter: Filter, ask: Ask) -> None:
    slow, feature = filter.slow, filter.features[0]
    encoded = {token.token_id for token in slow.encoded}
    for i, document in enumerate(slow.given.documents):
        mine = [t for t in slow.tokens if t.document_id == i]
        for number in (feature, None):
            rows = ask("document_tokens", document_key=document.key, feature=number)
            assert "".join(row["piece"] for row in rows) == (slow.text(i) if mine else "")
            assert [(row["token_id"], row["place"], row["position"], row["vocab_id"]) for row in rows] == [
                (t.token_id, place, t.position, t.vocab_id) for place, t in enumerate(mine)
            ]
            for row in rows:
                token = row["token_id"]
                n = sum((token, each) in slow.value for each in range(slow.given.n_features))
                value = None if number is None else slow.value.get((token, feature), 0)
                assert (row["value"], row["n_features"]) == ((value, n) if token in encoded else (None, None))
            for n in (1, 2):
                pages = [
                    row
                    for first in range(0, len(mine), n)
                    for row in ask("document_tokens", document_key=document.key, feature=number, first=first, n=n)
                ]
                assert pages == rows


def document_features(filter: Filter, ask: Ask) -> None:
    slow = filter.slow
    for i, document in enumerate(slow.given.documents):
        mine = {t.token_id for t in slow.encoded if t.document_id == i}
        rows = ask("document_features", document_key=document.key, n=99)
        order = [(-row["score"], row["feature_id"]) for row in rows]
        assert order == sorted(order)
        firing = {f: mine & set(slow.firing(f)) for f in range(slow.given.n_features)}
        assert {row["feature_id"] for row in rows} == {feature for feature, tokens in firing.items() if tokens}
        for row in rows:
            tokens, values = firing[row["feature_id"]], slow.firing(row["feature_id"])
            share, density = len(tokens) / len(mine), len(values) / len(slow.encoded)
            score = -math.log2(1 + len(tokens)) * math.log2(share / density) * math.log2(density)
            assert (row["n_tokens"], row["share"], row["density"]) == (len(tokens), share, density)
            assert (row["lift"], row["score"]) == (pytest.approx(share / density), pytest.approx(score, abs=1e-9))
            assert row["max_value"] == values[row["top_token_id"]] == peak(values[token] for token in tokens)


def entry_features(filter: Filter, ask: Ask) -> None:
    slow = filter.slow
    for entry in {t.vocab_id for t in slow.tokens[:3]}:
        mine = {token for token in filter.encoded() if slow.by_id[token].vocab_id == entry}
        rows = ask("entry_features", vocab=entry)
        order = [(-row["score"], row["feature_id"]) for row in rows]
        assert order == sorted(order)
        loud = {f: [v for t, v in filter.firing(f).items() if t in mine] for f in range(slow.given.n_features)}
        assert {row["feature_id"] for row in rows} == {feature for feature, values in loud.items() if values}
        for row in rows:
            values, every = loud[row["feature_id"]], slow.firing(row["feature_id"])
            share, density = len(values) / len(mine), len(every) / len(slow.encoded)
            assert (row["n_tokens"], row["n_counted"], row["n_entry"]) == (len(values), len(mine), len(mine))
            assert (row["share"], row["density"], row["lift"]) == (share, density, pytest.approx(share / density))
            assert row["own_share"] == pytest.approx(len(values) / len(every))
            assert row["mean_value"] == pytest.approx(np.mean(values))


def entry_followers(filter: Filter, ask: Ask) -> None:
    slow = filter.slow
    logits = {(row["feature_id"], row["vocab_id"]): row["logit"] for row in slow.given.tables.get("logits", ())}
    for entry in {t.vocab_id for t in slow.tokens[:3]}:
        mine = [token for token in filter.encoded() if slow.by_id[token].vocab_id == entry]
        inside = [t for t in mine if t + 1 in slow.by_id and slow.owner(t) == slow.owner(t + 1)]
        followed = {token: slow.by_id[token + 1].vocab_id for token in inside}
        after = Counter(followed.values())
        rows = ask("entry_followers", vocab=entry, n=99)
        order = sorted(after, key=lambda each: (-after[each], each))
        assert [(row["vocab_id"], row["n_tokens"]) for row in rows] == [(each, after[each]) for each in order]
        for row in rows:
            follower, n = row["vocab_id"], row["n_tokens"]
            assert row["share"] == n / len(inside)
            pushes, counts = dict[int, float](), dict[int, int]()
            for feature in range(slow.given.n_features):
                values = [v for t, v in filter.firing(feature).items() if followed.get(t) == follower]
                if values and (feature, follower) in logits:
                    pushes[feature] = sum(values) * logits[feature, follower] / n
                    counts[feature] = len(values)
            assert len(row["features"]) == min(5, len(pushes))
            assert row["pushes"] == pytest.approx([pushes[feature] for feature in row["features"]])
            assert row["n_fired"] == [counts[feature] for feature in row["features"]]
            assert [abs(push) for push in row["pushes"]] == sorted(map(abs, row["pushes"]), reverse=True)
            weaker = [abs(push) for feature, push in pushes.items() if feature not in row["features"]]
            assert max(weaker, default=0) <= min(map(abs, row["pushes"]), default=math.inf) + 1e-9


def feature_pair(filter: Filter, ask: Ask) -> None:
    slow = filter.slow
    similar = {(row["feature_id"], row["other_id"]): row["cosine"] for row in slow.given.tables.get("similar", ())}
    for feature, other in ((slow.features[0], slow.features[1]), (slow.features[3], slow.features[4])):
        one, two = filter.firing(feature), filter.firing(other)
        both = one.keys() & two.keys()
        (row,) = ask("feature_pair", feature=feature, other=other)
        assert (row["n_feature"], row["n_other"], row["n_both"]) == (len(one), len(two), len(both))
        assert row["jaccard"] == (len(both) / len(one | two) if one or two else None)
        assert row["share_of_feature"] == (len(both) / len(one) if one else None)
        assert row["share_of_other"] == (len(both) / len(two) if two else None)
        n = len(filter.encoded())
        pmi = math.log2(len(both) * n / (len(one) * len(two))) if both else None
        assert row["pmi"] == pytest.approx(pmi)
        pairs = np.array([(one[token], two[token]) for token in both]).reshape(-1, 2)
        varies = len(set(pairs[:, 0])) > 1 and len(set(pairs[:, 1])) > 1
        assert row["correlation"] == (pytest.approx(np.corrcoef(pairs.T)[0, 1]) if varies else None)
        near = [similar[pair] for pair in ((feature, other), (other, feature)) if pair in similar]
        assert row["cosine"] == max(near, default=None)


ABOUT_THE_STORE = (document_tokens, document_features)
FILTERED = (entry_features, entry_followers, feature_pair)


@settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("signed", [pytest.param(False, marks=pytest.mark.long), True], ids=["positive", "signed"])
def test_documents_entries_and_pairs_are_what_looking_at_each_token_finds(signed, data):
    world = data.draw(worlds(signed))
    slow = Slow(world)
    chosen = data.draw(filters(slow).filter(lambda each: not (each.since or each.until or each.role)))
    with tempfile.TemporaryDirectory() as folder, connect(world.write(Path(folder)), threads=1) as connection:
        for filter_ in (Filter(slow), chosen):
            for question in (*ABOUT_THE_STORE, *FILTERED) if filter_ is not chosen else FILTERED:
                arguments = filter_.arguments if question in FILTERED else {}
                question(filter_, lambda name, a=arguments, **own: ask(connection, name, own | a).to_pylist())


def test_an_entry_met_very_often_is_counted_on_a_draw_of_5000_tokens(tmp_path):
    given = Given(documents=[Document("k", "a", [b"a"] * 6000)], values=[(t, 0, 1.0) for t in range(0, 6000, 2)])
    with connect(given.write(tmp_path)) as connection:
        (row,) = ask(connection, "entry_features", [0]).to_pylist()
    assert (row["n_counted"], row["n_entry"], row["density"]) == (5000, 6000, 0.5)
    assert row["share"] == row["n_tokens"] / 5000 == pytest.approx(0.5, abs=0.02)
    assert row["own_share"] == pytest.approx(1, abs=0.04)


def test_a_document_in_letters_of_several_pieces_is_its_text_a_token_at_a_time(tmp_path):
    letters = [bytes([byte]) for byte in "€🐘".encode()]
    counts = Counter()
    with connect(Given(documents=[Document("k", "a", letters)], values=[(1, 2, 0.5)]).write(tmp_path)) as connection:
        for first in range(len(letters)):
            (row,) = ask(connection, "document_tokens", {"document_key": "k", "first": first, "n": 1}).to_pylist()
            counts[row["piece"]] += 1
        assert ask(connection, "document_tokens", {"document_key": "nowhere"}).num_rows == 0
    assert counts == {"€": 1, "🐘": 1, "": 5}
