"""Mistakes that pages of other tools make, looked for in what a person reads, with the run's files beside it.

No question is asked for what is expected: it is counted from the values and the tokens on disk.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from starlette.testclient import TestClient

from saeflow.pipeline.lineage import Lineage
from saeflow.runtime.text import sanitise
from tests.browser.reading import about, body, headings
from tests.conftest import Finished
from tests.support.html_tree import Element, parsed
from tests.support.stored_run import Stored

WINDOW = 12
"""Tokens on either side of a context, if the address does not say."""


@dataclass
class Files:
    """The values of every feature and the texts of every document, as they lie on disk."""

    stored: Stored

    @cached_property
    def documents(self) -> dict[str, list[Any]]:
        """Tokens of each document, by key."""
        keys = [document.key for document in self.stored.documents]
        found: dict[str, list[Any]] = {}
        for token in self.stored.every_token():
            if token.document_id is not None:
                found.setdefault(keys[token.document_id], []).append(token)
        return found

    @cached_property
    def places(self) -> dict[int, tuple[str, int]]:
        """Key and place in the document of each token."""
        return {token.token_id: (key, i) for key, some in self.documents.items() for i, token in enumerate(some)}

    def values(self, feature: int) -> dict[int, float]:
        return {token: value for token, other, value in self.stored.values if other == feature}

    def window(self, token_id: int) -> tuple[int, list[int]]:
        """Vocabulary entries around a token, and the token's place among them."""
        key, i = self.places[token_id]
        first = max(0, i - WINDOW)
        return i - first, [token.vocab_id for token in self.documents[key][first : i + WINDOW + 1]]

    def text(self, token_id: int) -> str:
        """The text of the window, without the halves of letters at its ends."""
        key, i = self.places[token_id]
        around = self.documents[key][max(0, i - WINDOW) : i + WINDOW + 1]
        return b"".join(self.stored.vocab[token.vocab_id] for token in around).decode("utf-8", "ignore")


@pytest.fixture(scope="module")
def files(finished: Finished) -> Files:
    return Files(Stored(finished.store, Lineage(finished.store, finished.recipe).features))


def page_of(pages: TestClient, feature: int, panel: str) -> Element:
    return parsed(pages.get(f"/runs/small/features/{feature}/{panel}").text)


def token_of(item: Element) -> int:
    return int(about(item.all("a"))[1]["at"])


def often(files: Files, n: int) -> list[int]:
    """Features drawn from those that fire at 30 tokens or more."""
    counts = Counter(feature for _, feature, _ in files.stored.values)
    return random.Random(1).sample(sorted(feature for feature, count in counts.items() if count >= 30), n)


def test_the_strongest_contexts_are_the_strongest_sorted_and_only_true_copies_are_folded(pages, files):
    for feature in often(files, 3):
        values = files.values(feature)
        first_of: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for token in sorted(values, key=lambda token: (-values[token], token)):
            place, entries = files.window(token)
            first_of.setdefault((place, tuple(entries)), []).append(token)
        shown = page_of(pages, feature, "strongest").all("li")
        assert [token_of(item) for item in shown] == [some[0] for some in first_of.values()][: len(shown)]
        assert len(shown) == min(50, len(first_of))
        for item, some in zip(shown, first_of.values(), strict=False):
            assert [each.words for each in item.all("small")] == ([f"× {len(some)}"] if len(some) > 1 else [])
            assert float(item.all("b")[0].words) == pytest.approx(values[some[0]], rel=5e-4)


def test_each_band_holds_as_many_tokens_as_it_says_and_its_contexts_lie_inside(pages, files):
    for feature in often(files, 3):
        values = files.values(feature)
        ranked = sorted(values, key=lambda token: (-values[token], token))
        page, left = page_of(pages, feature, "bands"), ranked
        for head, items in zip(page.all("h4"), page.all("ol.contexts"), strict=True):
            n_tokens = int(head.text.partition(":")[2].split()[0].replace(",", ""))
            band, left = left[:n_tokens], left[n_tokens:]
            assert {token_of(item) for item in items.all("li")} <= set(band)
            low, high = (float(word) for word in head.text.partition(":")[0].split(" to "))
            assert (low, high) == pytest.approx((values[band[-1]], values[band[0]]), rel=5e-4)
        assert not left


def test_similar_features_are_those_of_the_largest_cosines_of_decoder_rows(pages, finished):
    (weights,) = Lineage(finished.store, finished.recipe).sae.path.rglob("*.safetensors")
    (decoder,) = (each for name, each in load_file(weights).items() if name.endswith("W_dec"))
    rows = decoder.astype(np.float64) / np.linalg.norm(decoder.astype(np.float64), axis=1, keepdims=True)
    for feature in random.Random(2).sample(range(len(rows)), 4):
        cosines = rows @ rows[feature]
        cosines[feature] = -2
        found = page_of(pages, feature, "similar").all("#similar")[0].one("table")
        shown, column = body(found), headings(found).index("cosine")
        assert len(shown) == 10
        for cells, other in zip(shown, np.argsort(-cosines, kind="stable")[: len(shown)], strict=True):
            number = int(about(cells[0].all("a"))[0][-1])
            assert cosines[number] == pytest.approx(cosines[other], abs=2e-3)
            assert float(cells[column].words) == pytest.approx(cosines[number], abs=2e-3)


def without_values(shown: Element) -> str:
    """The text of tokens, without the values that they say."""
    for token in (each for each in shown.within() if each.tag in ("mark", "a")):
        token.children = [each for each in token.children if isinstance(each, str) or each.tag != "i"]
    return shown.text


def test_no_letter_of_several_tokens_is_broken(pages, files):
    """Texts of all scripts are read on the pages as they were written."""
    seen = set[str]()
    for feature in often(files, 8):
        for item in page_of(pages, feature, "strongest").all("li"):
            plain, text = files.text(token_of(item)), without_values(item.one("q"))
            if "\r" not in plain:  # two tokens may share a line break
                assert text == sanitise(plain)
            seen |= {each for each in text if ord(each) > 0x2FF}
    assert len(seen) > 10
    for key in ("chinese", "arabic", "emoji", "combining"):
        page = parsed(pages.get("/runs/small/doc", params={"key": key}).text)
        whole = b"".join(files.stored.vocab[token.vocab_id] for token in files.documents[key])
        assert without_values(page.one("p.text")).strip() == whole.decode().strip()
