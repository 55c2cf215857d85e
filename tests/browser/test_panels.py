"""Each panel's rows are those of its SQL, and a person reads these rows and no others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

import saeflow
from saeflow.browser.server import application
from saeflow.query.connection import connect
from saeflow.query.labels import Label, put
from saeflow.query.text_formats import as_json_value
from saeflow.store.store import Store
from tests.browser.conftest import ADDRESS
from tests.browser.reader import Reader
from tests.conftest import Finished
from tests.support.beside import put_classes, put_effects, put_scores, put_spans
from tests.support.html_tree import parsed
from tests.support.small_store import Document, Given

UNDER_FILTER = "source=tales&threshold=0.1&without_feature=2"
PAGES = [
    "/.json", "/compare-runs.json?a={run}&b={run}", "/runs/{run}.json", "/runs/{run}/features.json?text=a&n=5",
    "/runs/{run}/ask/feature_summary.json", "/runs/{run}/features/1.json?all=1",
    f"/runs/{{run}}/features/1.json?all=1&before=3&after=0&{UNDER_FILTER}", "/runs/{run}/features/1/strongest.json?n=3",
    f"/runs/{{run}}/features/1/bands.json?{UNDER_FILTER}", "/runs/{run}/features/1/random.json",
    "/runs/{run}/features/1/near_misses.json?vocab=270",
    f"/runs/{{run}}/compare.json?a=1&b=2&{UNDER_FILTER}", "/runs/{run}/tokens.json?text=a",
    "/runs/{run}/tokens-at/3.json", "/runs/{run}/docs.json?text=tales&source=tales&after_id=2",
    f"/runs/{{run}}/features/1/companions.json?{UNDER_FILTER}", "/runs/{run}/doc.json?key=tales/000&feature=1&first=5",
    "/runs/{run}/sources.json", "/runs/{run}/sources.json?a=letters&b=tales", "/runs/{run}/features.json?source=tales",
    "/runs/{run}/selection.json?tokens=3,7,40,41",
    "/runs/{run}/docs/tales/000.json", f"/runs/{{run}}/tokens/270.json?{UNDER_FILTER}", "/runs/{run}/tokens/270.json",
]  # fmt: skip
FURTHER = [
    "/runs/{run}/features.json", "/runs/{run}/features.json?sort=density&kind=other",
    "/runs/{run}/compare.json?a=3&b=0", "/runs/{run}/ask/feature_bands.json?feature=3",
    f"/runs/{{run}}/features/2/near_misses.json?{UNDER_FILTER}", "/runs/{run}/doc.json?key=chinese",
    "/runs/{run}/doc.json?key=emoji&feature=5", "/runs/{run}/tokens/30.json",
    "/runs/{run}/selection.json?tokens=5",
    "/runs/{run}/ask/documents.json", "/runs/{run}/ask/runs.json", "/runs/{run}/try.json?text=the+dog",
]  # fmt: skip

ODD = [
    b"<i>",
    b"</bdi>",
    b"\x1b[31m",
    b"\0",
    "\u202eabc".encode(),
    b"\n",
    b" ",
    b"&amp;",
    b"\xc3",
    b"\xa9",
    b"  ",
    b"\t",
]


@pytest.fixture(scope="module")
def opened(finished: Finished) -> Iterator[saeflow.OpenRun]:
    with saeflow.open(finished.store.root) as run:
        yield run


@pytest.mark.parametrize("address", PAGES)
def test_the_sql_of_each_panel_gives_its_rows(pages: TestClient, opened: saeflow.OpenRun, address: str):
    run = pages.get("/.json").json()["panels"]["runs"]["rows"][0]["schema_name"]
    for name, panel in pages.get(address.format(run=run)).json()["panels"].items():
        rows = opened.sql(panel["sql"].removesuffix(";")).to_pylist()
        assert json.loads(json.dumps(as_json_value(rows))) == panel["rows"], name


@pytest.fixture(scope="module")
def reader(pages: TestClient, finished: Finished) -> Iterator[Reader]:
    with contextlib.closing(connect(finished.store)) as connection:
        yield Reader(pages, connection, "small")


@pytest.mark.parametrize("address", [*PAGES, *(pytest.param(each, marks=pytest.mark.long) for each in FURTHER)])
def test_a_page_shows_every_row_of_its_sql_and_no_other(reader: Reader, address: str):
    assert reader.read(address.format(run=reader.name).replace(".json", "", 1))


def given_pages(store: Store, name: str) -> Iterator[Reader]:
    with contextlib.closing(connect(store, name)) as connection:
        yield Reader(TestClient(application(store), base_url=ADDRESS), connection, name)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Two runs: a signed one of hostile texts with roles, and a small one of the same tokens."""
    folder = tmp_path_factory.mktemp("odd") / "store"
    documents = [Document("a&b", "<b>s</b>", ODD), Document("ends ", None, [b" two  spaces ", b"\t", *ODD])]
    n_tokens = sum(len(document.pieces) for document in documents)
    values = [(token, token % 3, (-1) ** token * (0.25 + token / 7)) for token in range(n_tokens)]
    roles = {token: ("user", "assistant")[token > 12] for token in range(n_tokens)}
    Given(documents, values, roles=roles, name="small", fp="f0000002").write(folder)
    store = Given(documents, values, roles=roles, name="odd", signed=True).write(folder)
    put_meaning(store)
    yield from given_pages(store, "odd")


def put_meaning(store: Store) -> None:
    """Labels with scores, classes and effects of features of the run `odd`; feature 1 has none of them."""
    run, tokens = store.by_id("features/odd-f0000001"), store.by_id("tokens/odd-f0000001")
    put(store, "odd-f0000001", "own", {0: Label("mine")})
    put(store, "odd-f0000001", "judged", {0: Label("<i>theirs", 0.875), 2: Label("x", 0.5)})
    strata = [(method, stratum) for method in ("detection", "fuzzing") for stratum in ("all", "band_1", "random")]
    put_scores(
        store, run, "judged",
        [{"feature_id": 0, "method": method, "stratum": stratum, "score": 1 / (2 + i), "low": 0.01, "high": 0.99,
          "n": i} for i, (method, stratum) in enumerate(strata)],
        [{"feature_id": 0, "token_id": token, "asked": token % 2 == 0, "answered": token % 2 == 1}
         for token in range(5)]
        + [{"feature_id": 0, "model": "", "method": "rule", "stratum": "random", "token_id": 7 + silent,
            "asked": not silent, "answered": bool(silent)} for silent in range(2)],
    )  # fmt: skip
    put_spans(store, tokens, "kinds", [("<u>", 0, 2, 4), ("<u>", 0, 7, 7), ("long", 1, 13, 20)])
    put_classes(
        store, run, "kinds",
        [{"class": name, "feature_id": feature, "n_fires": 9, "n_both": 5 - feature, "auroc": 0.7 - feature / 8,
          "auroc_low": None if feature else 0.5, "auroc_high": None if feature else 0.9, "f1": 1 / 3, "q": 1e-5}
         for name in ("<u>", "long") for feature in (0, 2)],
    )  # fmt: skip
    firings = [
        {"effect": effect, "feature_id": feature, "token_id": token, "ahead": ahead, "document_id": token // 12,
         "value": 0.5, "loss_change": None if token == 3 else token / 7 - 1, "kl": token / 3,
         "up": [(token % 5, 0.125, 0.25)], "down": [(entry, 0.5, 0.25 / (1 + token)) for entry in (6, 7)]}
        for effect in ("a&b", "zeroed") for feature in (0, 2) for token in (0, 3, 15) for ahead in (0, 1)
    ]  # fmt: skip
    put_effects(store, run, firings, [{"effect": "zeroed", "feature_id": 0, "vocab_id": 6, "logit": -0.3}])


@pytest.mark.long
@pytest.mark.parametrize(
    "address",
    ["/", "/compare-runs?a=odd&b=small", "/runs/odd/features", "/runs/odd/features/0?all=1", "/runs/odd/docs",
     "/runs/odd/features/1?all=1&role=user&threshold=-0.5", "/runs/odd/features/2?all=1&with_feature=1",
     "/runs/odd/doc?key=a%26b&feature=0", "/runs/odd/doc?key=ends+", "/runs/odd/tokens?text=%3C",
     "/runs/odd/ask/feature_contexts?feature=0&role=assistant", "/runs/odd/features/0/bands?role=user",
     "/runs/odd/selection?tokens=0,5,13,14,20", "/runs/odd/classes",
     "/runs/odd/classes?annotation=kinds&class=%3Cu%3E", "/runs/odd/classes?annotation=kinds&class=long"],
)  # fmt: skip
def test_signed_values_roles_and_hostile_texts_read_as_their_sql_answers(odd: Reader, address: str):
    assert odd.read(address)


def test_a_page_shows_what_was_measured_and_says_how_to_measure_the_rest(odd: Reader):
    def panels(address: str) -> set[str]:
        return {each.attributes["id"] for each in parsed(odd.pages.get(address).text).all("section.panel")}

    measured = {"scores", "mistakes", "classes", "effects", "moved", "effect_contexts"}
    assert panels("/runs/odd/features/0?all=1") >= measured | {"labels"}
    assert not measured & panels("/runs/odd/features/1?all=1")
    said = parsed(odd.pages.get("/runs/odd/features/1").text).one("section.unknown").words
    assert "saeflow effects odd --features 1" in said
    assert "saeflow explain odd --features 1" in said
    assert "saeflow effects" not in odd.pages.get("/runs/odd/features/0").text
    assert "Nobody has said so yet" in odd.pages.get("/runs/odd/features/1").text


def test_the_label_that_names_a_feature_is_told_from_the_others(odd: Reader):
    rows = odd.json("/runs/odd/features/0")["panels"]["labels"]["rows"]
    assert [(row["label"], row["source"], row["score"], row["is_name"]) for row in rows] == [
        ("mine", "own", None, True),
        ("<i>theirs", "judged", 0.875, False),
    ]


def test_the_points_of_the_map_say_what_its_sql_link_answers(reader: Reader):
    page = parsed(reader.pages.get(f"{reader.run}/map").text)
    link = page.one("main").one("a.sql").attributes["href"]
    spec = json.loads(page.one("figure.chart").one("script").text)
    points = reader.pages.get(spec["data"]["url"]).json()[spec["data"]["format"]["property"]]
    rows = {row["feature_id"]: row for row in reader.rows(reader.json(link)["panels"]["rows"]["sql"])}
    assert len(points) == len(rows)
    for point in points:
        assert {name: point[name] for name in ("label", "density", "max_value")}.items() <= rows[
            point["feature_id"]
        ].items()


def test_a_page_without_rows_says_why(tmp_path):
    """A class that no feature fires on is not one that was never probed; tokens may not be there at all."""
    store = Given().write(tmp_path / "store")
    (run,), (tokens,) = store.artefacts("features"), store.artefacts("tokens")
    put_spans(store, tokens, "marks", [("silent", 0, 2, 2), ("new", 0, 3, 3)])
    put_spans(store, tokens, "other", [("elsewhere", 0, 0, 0)])
    put_classes(store, run, "marks", [{"class": "silent", "feature_id": 0, "n_fires": 3, "n_both": 0}])
    with TestClient(application(store), base_url=ADDRESS) as client:
        pages = {
            "classes?annotation=marks&class=silent": "No feature fires on a token of this class.",
            "classes?annotation=marks&class=new": "compared with this class yet. In a terminal: saeflow probe marks",
            "classes?annotation=marks&class=elsewhere": "The annotation &#39;marks&#39; has no class",
            "selection?tokens=99": "The corpus has none of these tokens.",
            "selection?tokens=2": "No feature fires on a token that is chosen and encoded.",
        }
        for address, said in pages.items():
            assert said in client.get(f"/runs/demo/{address}").text, address
