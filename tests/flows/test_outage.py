"""`saeflow serve` and a Prefect server that is away, has never been there, or is somebody's mistake in a setting."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.support import serve
from saeflow.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # Prefect's own

URL = "http://127.0.0.1:1/api"
LOST = ExceptionGroup("of a task group", [RuntimeError("Service exceeded error threshold.")])


class Deployment:
    """As much of one as is looked at."""

    full_name, tags, paused = "saeflow-ingest/nightly", ["saeflow"], False


class Runner:
    """Prefect's, in the place of which `ends` says how each one ends."""

    ends: list[Callable[[], None]]
    folder: Path
    n = 0

    def __init__(self, **_: Any) -> None:
        Runner.n += 1
        self._tmp_dir = Runner.folder / str(Runner.n)

    def add_deployment(self, _: Deployment) -> Any:
        return uuid4()

    def handle_sigterm(self, *_: Any) -> None:
        raise AssertionError

    async def start(self) -> None:
        self._tmp_dir.mkdir()
        signal.signal(signal.SIGTERM, self.handle_sigterm)
        Runner.ends.pop(0)()


def failing(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that were started at once, by the name of their deployment. The server is silent at every second look."""
    answers, runs = iter([None, "connection refused"] * 10), list[str]()
    Runner.folder, Runner.n = tmp_path, 0

    class Client:
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def create_flow_run_from_deployment(self, _: object, tags: list[str]) -> None:
            runs.append(" ".join(tags))

    monkeypatch.setattr(serve, "Runner", Runner)
    monkeypatch.setattr(serve, "get_client", lambda **_: Client())
    monkeypatch.setattr(serve, "keep_what_was_set", lambda _: None)
    monkeypatch.setattr(serve, "_silence", lambda _: next(answers))
    monkeypatch.setattr(serve, "SECONDS_BETWEEN_LOOKS", 0.0)
    return runs


def work(*ends: Callable[[], None]) -> list[str]:
    """What is said while runners end like this, one after the other."""
    said: list[str] = []
    Runner.ends = list(ends)
    with temporary_settings({PREFECT_API_URL: URL}):
        serve.work([Deployment()], {Deployment.full_name}, None, said.append)  # type: ignore[list-item]
    return said


def test_a_server_that_is_away_is_waited_for_and_nothing_is_left_behind(begun: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    refused = httpx.ConnectError("refused")
    said = work(failing(LOST), failing(ExceptionGroup("", [ExceptionGroup("", [refused])])), lambda: None)
    assert [f"The Prefect server at {URL} is away" in each for each in said] == [True, False, True, False]
    assert Runner.n == 3
    assert begun == ["saeflow at-start"], "what runs at the start of serve ran again"
    assert list(tmp_path.iterdir()) == []
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_ends_serve_while_it_waits(begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_silence", lambda _: failing(KeyboardInterrupt())())
    assert len(work(failing(LOST))) == 1
    assert begun


@pytest.mark.usefixtures("begun")
def test_an_error_that_is_no_outage_is_not_waited_out(tmp_path: Path) -> None:
    refused = httpx.Response(422, request=httpx.Request("POST", URL))
    for error in (ValueError("a mistake"), httpx.HTTPStatusError("", request=refused.request, response=refused)):
        with pytest.raises(ExceptionGroup):
            work(failing(ExceptionGroup("", [LOST, error])))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://host:abc/api", "http://127.0.0.1:1/api"])
def test_a_place_where_no_server_can_be_is_said(url: str) -> None:
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(UserError, match=f"No Prefect server answers at {url} "),
        serve.found(),
    ):
        pass
