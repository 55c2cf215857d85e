"""A store of hostile texts, names, labels and lengths: every page in every format, and every question on a terminal."""

from __future__ import annotations

import csv
import io
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import saeflow
from saeflow.browser.answers import FORMATS
from saeflow.browser.server import Application
from saeflow.classes.annotations import Source, annotate
from saeflow.cli.answers.screen import render_table
from saeflow.query.labels import Label, put
from saeflow.query.questions import Question, questions
from saeflow.query.text_formats import for_python
from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal
from saeflow.store.store import Store
from tests.fuzz.pages import HOSTILE as WORDS
from tests.fuzz.pages import LABEL, Asking, problems_of
from tests.support.asgi import Answered, ask
from tests.support.beside import put_classes, put_effects, put_scores, put_spans
from tests.support.hostile_text import ACTS, HOSTILE
from tests.support.small_store import Document, Given

MANY, LONG = 9, 1_000_000
PIECES = [
    *(word.encode("utf-8", "surrogatepass") for word in [*WORDS, HOSTILE] if word),
    b"\xed\xa0\x80", b"\xff\xfe", b"\xc3", b"\xa9", "\u2028\u200b\ufeff\u2066".encode(), b"@SUM(1)", b"\t=1",
    b'=HYPERLINK("http://evil.example";"x")',
]  # fmt: skip
NAMES = ["<zq9>'\"", "=1+1", "../..", HOSTILE, "x" * 5000, "a\nb", "%2e%00"]
"""Keys of documents, which are their sources and titles, too."""

LARGEST = 1_000_000
"""Bytes of any answer here, although each of nine tokens has a megabyte."""


@dataclass
class Place:
    """The store's pages, the folder it lies in, and its run."""

    application: Application
    root: Path
    run: str = "hostile"

    def ask(self, address: str) -> Answered:
        answer = ask(self.application.app, address)
        assert list(problems_of(Asking(address), answer, 0.0)) == []
        assert len(answer.body) < LARGEST
        return answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Two documents of each name, and nine of a single token of a megabyte. Feature 0 fires everywhere."""
    root = tmp_path_factory.mktemp("hostile") / "store"
    documents = [Document(name, name, PIECES) for name in NAMES]
    documents += [Document(f"long/{i}", "long", [bytes([97 + i]) * LONG]) for i in range(MANY)]
    n_tokens = len(NAMES) * len(PIECES) + MANY
    values = [
        (token, feature, 1.0 + token) for token in range(n_tokens) for feature in range(2) if not token % (feature + 1)
    ]
    n_entries = len({piece for document in documents for piece in document.pieces})
    given = Given(
        documents,
        values,
        name="hostile",
        metadata={
            "title": pa.array([document.key for document in documents]),
            "date": pa.array([3 * 10**18] * len(documents), pa.timestamp("us")),
        },
        tables={
            "logits": [{"feature_id": 0, "vocab_id": i, "logit": 1.0 + i} for i in range(min(n_entries, 20))],
            "similar": [{"feature_id": 0, "other_id": 1, "cosine": 0.5}],
        },
    )
    store = given.write(root)
    folder = root / "saes" / "hostile-f0000001"
    folder.mkdir(parents=True)
    save_file(
        {"W_dec": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)},
        folder / "sae_weights.safetensors",
    )
    put(store, folder.name, "own", {0: Label("<zq9>" * 2000), 1: Label("=1+1"), 2: Label(HOSTILE)})
    put_meaning(store, n_entries)
    classes = {"class": ["<zq9>'\"", "=1+1", HOSTILE], "token_id": [0, 3, 5]}
    pq.write_table(pa.table(classes), root.parent / "classes.parquet")
    annotate(store, None, "hostile", Source(root.parent / "classes.parquet"), Progress(verbosity=-1))
    return Place(Application(store), root)


def put_meaning(store: Store, n_entries: int) -> None:
    """Scores of labels, classes and effects whose every name is hostile."""
    (run,), (tokens,) = store.artefacts("features"), store.artefacts("tokens")
    words = {"model": NAMES[0], "method": NAMES[1], "stratum": NAMES[3]}
    put_scores(
        store, run, "own",
        [{"feature_id": 0, **words, "score": 0.75, "low": 0.5, "high": 0.875, "n": 8}],
        [{"feature_id": 0, **words, "token_id": token, "asked": token % 2 == 0, "answered": token % 2 == 1}
         for token in (0, 7, 250)],
    )  # fmt: skip
    put_spans(store, tokens, "marks", [(name, 0, 3 * i, 3 * i + 1) for i, name in enumerate(NAMES)])
    figures = {"auroc": 0.75, "auroc_low": 0.5, "auroc_high": 0.875, "f1": 0.5, "q": 0.001}
    put_classes(
        store, run, "marks",
        [{"class": name, "feature_id": feature, "n_fires": 9, "n_both": 5, **figures}
         for name in NAMES for feature in range(2)],
    )  # fmt: skip
    moved = [(entry, 0.25, 0.5) for entry in range(min(n_entries, 5))]
    firings = [
        {"effect": name, "change": name, "feature_id": 0, "token_id": token, "document_id": 0, "value": 1.0,
         "loss_change": 0.5, "kl": 0.25, "up": moved, "down": moved[:2]}
        for name in NAMES[:4] for token in (0, 7, 250)
    ]  # fmt: skip
    put_effects(store, run, firings, [{"effect": NAMES[0], "feature_id": 0, "vocab_id": 1, "logit": 0.5}])


RUN = "/runs/{run}"
MANY_PANELS = (
    "bands", "strongest", "random", "near_misses", "entries", "mistakes", "classes", "effects", "moved",
    "effect_contexts",
)  # fmt: skip
PLACES: dict[str, list[str]] = {
    "/": ["/"],
    "/about": ["/about"],
    "/compare-runs": ["/compare-runs?a=hostile&b=hostile&match=on"],
    "/static/charts.js": [],
    "/static": [],
    LABEL: [],
    RUN: ["/runs/hostile"],
    f"{RUN}/features": [
        f"/runs/hostile/features{query}" for query in ("", "?text=%3Czq9", "?text=%1B", "?sort=id&n=1")
    ],
    f"{RUN}/features/{{feature}}": ["/runs/hostile/features/0?all=1&before=100&after=100", "/runs/hostile/features/1"],
    f"{RUN}/features/{{feature}}/{{panel}}": [f"/runs/hostile/features/0/{panel}?n=50" for panel in MANY_PANELS],
    f"{RUN}/compare": ["/runs/hostile/compare?a=0&b=1"],
    f"{RUN}/sources": [
        "/runs/hostile/sources",
        f"/runs/hostile/sources?{urllib.parse.urlencode({'a': NAMES[0], 'b': NAMES[1]})}",
    ],
    f"{RUN}/classes": [
        "/runs/hostile/classes",
        *(f"/runs/hostile/classes?{urllib.parse.urlencode({'annotation': 'marks', 'class': name})}" for name in NAMES),
    ],
    f"{RUN}/docs": ["/runs/hostile/docs", "/runs/hostile/docs?text=%3Czq9"],
    f"{RUN}/doc": [
        f"/runs/hostile/doc?{urllib.parse.urlencode({'key': name, 'feature': 0})}" for name in [*NAMES, "long/3"]
    ],
    f"{RUN}/docs/{{doc:path}}": ["/runs/hostile/docs/long/1"],
    f"{RUN}/tokens": ["/runs/hostile/tokens?text=a", "/runs/hostile/tokens?text=%3Czq9", "/runs/hostile/tokens"],
    f"{RUN}/tokens/{{vocab}}": [f"/runs/hostile/tokens/{entry}" for entry in (0, 5, 40)],
    f"{RUN}/tokens-at/{{token}}": [f"/runs/hostile/tokens-at/{token}" for token in (0, 7, 250)],
    f"{RUN}/selection": ["/runs/hostile/selection?tokens=0,7,250", "/runs/hostile/selection"],
    f"{RUN}/try": ["/runs/hostile/try", "/runs/hostile/try?text=%3Czq9%3E"],
    f"{RUN}/map": ["/runs/hostile/map"],
    f"{RUN}/questions": ["/runs/hostile/questions"],
    f"{RUN}/ask/{{question}}": [],  # below
}
"""Addresses of every route. A route that has none here is asked elsewhere."""


def arguments(question: Question) -> dict[str, Any]:
    """Arguments that give rows."""
    chosen = {
        "feature": 0, "features": "0,1", "thresholds": "0,0", "token": 3, "vocab": 5, "other": 1, "window": 3,
        "text": "a", "document_key": NAMES[0], "first_char": 0, "end_char": 9, "a": NAMES[0], "b": NAMES[1],
    }  # fmt: skip
    chosen |= {"matches": "1,0", "other_run": "hostile"}
    chosen |= {"tokens": "3,250", "annotation": "marks", "class": NAMES[0]}
    if question.name.endswith("_runs"):
        chosen |= {"a": "hostile", "b": "hostile"}
    tokens = {"tokens": "3,4,5"} if question.takes_select else {}
    return tokens | {each.name: chosen[each.name] for each in question.parameters if each.default is None}


ASKED = [
    each for each in questions() if not each.runs_model and not each.name.endswith("features_by_role")
]  # it has no roles
PLACES[f"{RUN}/ask/{{question}}"] = [
    f"/runs/hostile/ask/{each.name}?{urllib.parse.urlencode(arguments(each))}" for each in ASKED
]


def test_every_route_is_asked(place: Place) -> None:
    """A new page has to be named above."""
    routes = place.application.app.app.routes  # type: ignore[attr-defined]
    assert {route.path for route in routes} == set(PLACES)


@pytest.mark.parametrize("route", [route for route in PLACES if PLACES[route]])
def test_hostile_text_stays_text_on_every_page(place: Place, route: str) -> None:
    for address in PLACES[route]:
        assert place.ask(address).status == 200, address


@pytest.mark.long
@pytest.mark.parametrize("route", [route for route in PLACES if PLACES[route]])
def test_hostile_text_stays_text_in_every_format(place: Place, route: str) -> None:
    for number, address in enumerate(PLACES[route]):
        path, _, query = address.partition("?")
        for ending in FORMATS if len(PLACES[route]) < 4 else FORMATS[number % 3 :][:1]:  # of many addresses, one each
            check_format(ending, place.ask(f"{path}.{ending}?{query}"))


def check_format(ending: str, answer: Answered) -> None:
    if ending != "json" and answer.status == 404:
        assert "no rows" in answer.text
        return
    assert answer.status == 200
    if ending == "json":
        assert answer.body.isascii()
        assert not ACTS.search(answer.text)
    elif ending == "csv":
        first, *rows = csv.reader(io.StringIO(answer.text, newline=""))
        assert {len(row) for row in rows} <= {len(first)}
        assert not [cell for row in rows for cell in row if cell[:1] in tuple("=@\t\r\n") or cell[:2] == "+1"]
    else:
        assert pq.read_table(io.BytesIO(answer.body)).num_columns


def shown(table: pa.Table) -> str:
    console = Terminal(file=io.StringIO(), width=80, color_system=None)
    render_table(for_python(table), console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def opened(place: Place) -> Iterator[Any]:
    with saeflow.open(place.root) as run:
        yield run


@pytest.mark.parametrize("question", ASKED, ids=lambda question: question.name)
def test_hostile_text_does_not_act_on_a_terminal(opened: Any, question: Question) -> None:
    table = opened.ask(question.name, limit=20, **arguments(question))
    assert not ACTS.search(shown(table).replace("\n", ""))


def test_a_long_token_is_cut_in_answers_and_whole_in_sql(opened: Any) -> None:
    assert opened.sql("select max(length(piece)) as n from tokens").column(0)[0].as_py() == 1001
    whole = opened.sql("select max(length(whole_piece)) as n from stg_vocab").column(0)[0].as_py()
    assert whole == LONG
    row = opened.ask("contexts", feature=0, n=1).to_pylist()[0]
    assert row["pieces"] == ["i" * 1000 + "…"]
    entries = opened.ask("search_token", text="b" * 2000).to_pylist()
    assert [(row["piece"], row["n_tokens"]) for row in entries] == [("b" * 1000 + "…", 1)]


def test_a_letter_that_a_long_token_begins_is_kept(tmp_path: Path) -> None:
    document = Document("d", "s", [("é" * 700).encode() + b"\xf0\x9f", b"\x90\x98", b"!"])
    store = Given([document], [(0, 0, 1.0), (1, 0, 2.0)]).write(tmp_path / "store")
    with saeflow.open(store.root) as run:
        row = run.ask("contexts", feature=0, n=1).to_pylist()[0]
        assert row["pieces"] == ["é" * 500 + "…🐘", "", "!"]
        place = run.ask("context", token=1).to_pylist()[0]
        assert (place["text_before"], place["token_text"]) == ("é" * 500 + "…", "🐘")
