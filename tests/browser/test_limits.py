"""What a page may take of the machine: time, places, memory, threads, rows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
from dask.system import cpu_count
from starlette.testclient import TestClient

from saeflow.browser.connections import Connections, TooSlow
from saeflow.browser.panels import MOST_ROWS, Panel, refuse_large
from saeflow.browser.server import LOOPBACK, Application
from saeflow.runtime.errors import UserError
from saeflow.runtime.memory import total_memory
from tests.browser.conftest import ADDRESS
from tests.conftest import Finished

ENDLESS = "select sum(a.i * b.i) from range(1000000) as a(i), range(1000000) as b(i)"


@pytest.fixture(scope="module")
def hasty(finished: Finished) -> Iterator[Connections]:
    """Connections that wait half a second; the run is open already."""
    connections = Connections(finished.store)
    with connections.opened():
        connections.seconds = 0.5
    yield connections
    connections.close()


def ask_after(pause: float, connections: Connections) -> None:
    with connections.opened() as opened:
        time.sleep(pause)
        opened.cursor.execute(ENDLESS)


@pytest.mark.parametrize("pause", [0.0, 0.8], ids=["while it runs", "before it begins"])
def test_a_question_is_stopped_when_its_time_is_over(hasty: Connections, pause: float) -> None:
    with pytest.raises(TooSlow, match="saeflow ask"):
        ask_after(pause, hasty)
    with hasty.opened() as opened:
        assert opened.cursor.execute("select 1").fetchall() == [(1,)]


def test_as_many_questions_as_cores_are_asked_at_the_same_time(hasty: Connections, finished: Finished) -> None:
    pages = TestClient(Application(finished.store, LOOPBACK, hasty).app, base_url=ADDRESS)
    with contextlib.ExitStack() as busy:
        for _ in range(cpu_count()):
            busy.enter_context(hasty.opened())
        answer = pages.get("/runs/small/features")
    assert answer.status_code == 503
    assert "at the same time" in answer.text
    assert 'href="/runs/small"' in answer.text
    with hasty.opened() as opened:
        assert opened.run.schema == "small"


def test_a_question_has_an_eighth_of_the_memory_and_can_neither_change_that_nor_write(hasty: Connections) -> None:
    hasty.seconds = 20.0
    settings = (
        "select current_setting('memory_limit'), current_setting('threads'), current_setting('lock_configuration')"
    )
    with hasty.opened() as opened:
        size, threads, is_locked = opened.cursor.execute(settings).fetchall()[0]
        number, unit = size.split()
        assert float(number) * {"GiB": 1 << 30, "MiB": 1 << 20}[unit] <= total_memory() / 8 * 1.01
        assert threads <= cpu_count()
        assert is_locked
        for statement in ("set memory_limit = '99GB'", "copy (select 1) to '/tmp/saeflow-written.csv'"):
            with pytest.raises(Exception, match=r"locked|disabled"):
                opened.cursor.execute(statement)


def test_a_page_shows_no_more_rows_than_it_says(pages: TestClient, hasty: Connections) -> None:
    html = pages.get("/runs/small/ask/tokens").text
    assert html.count("<tr>") == 1 + MOST_ROWS
    assert f"The first {MOST_ROWS:,} rows." in html
    assert len(pages.get("/runs/small/ask/tokens.json").json()["panels"]["rows"]["rows"]) > MOST_ROWS
    hasty.seconds = 20.0
    with hasty.opened() as opened:
        few = Panel("rows", "", "tokens", most_rows=5).ask(opened)
    assert (len(few.rows), few.has_more) == (5, True)
    assert few.sql.endswith(" limit 5;")


def test_an_answer_of_more_bytes_than_pages_give_is_refused() -> None:
    table = pa.table({"text": ["x" * 1000] * 100})
    refuse_large(table)
    with pytest.raises(UserError, match="saeflow ask"):
        refuse_large(table, 50_000)


def test_no_address_has_a_model_looked_for_elsewhere_or_reads_a_long_text(pages: TestClient) -> None:
    for page, query in (("try", "text=a&model=gpt2"), ("ask/features_of_text", "text=a&model=some/name")):
        assert "the whole path of a folder" in pages.get(f"/runs/small/{page}?{query}").text
    for page in ("try", "ask/features_of_text", "ask/text_tokens"):
        assert "longer than 5,000" in pages.get(f"/runs/small/{page}?text={'x' * 5001}").text
