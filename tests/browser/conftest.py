"""Pages of the small finished store, asked in this process."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from saeflow.browser.server import application
from tests.conftest import Finished

ADDRESS = "http://127.0.0.1:8417"


@pytest.fixture(scope="session")
def pages(finished: Finished) -> TestClient:
    """A client of the finished store's pages. Its run is called `small`; do not change labels."""
    return TestClient(
        application(finished.store), base_url=ADDRESS, follow_redirects=False, raise_server_exceptions=False
    )
