"""A walk through a store's pages in real Chromium, by keyboard alone: runs, feature, document, token, and back.

python -m tests.support.walk STORE
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.chromium import CHROMIUM, Window, window
from tests.support.command import SAEFLOW


def at(page: Window, text: str) -> None:
    """Wait until the window shows a page whose address holds a text."""
    page.wait(f"location.href.includes({json.dumps(text)}) && document.readyState == 'complete'")


def tab_to(page: Window, selector: str) -> None:
    for _ in range(300):
        page.press("Tab")
        if page.value(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def walk(page: Window, address: str, text: str = "a") -> list[str]:
    """Walk from the runs to a token of the newest run and back; return the addresses on the way.

    Raises TimeoutError or AssertionError where a key does not lead on.
    """
    seen: list[str] = []

    def arrived(part: str) -> None:
        at(page, part)
        seen.append(str(page.value("location.pathname + location.search")))

    page.open(f"{address}/")
    arrived(f"{address}/")
    for key in ("j", "Enter"):
        page.press(key)
    arrived("/runs/")
    run = seen[-1]
    page.press("f")
    arrived(f"{run}/features")
    page.press("/")
    page.type(text)
    page.press("Enter")
    arrived(f"{run}/features?text={text}")
    for key in ("j", "j", "k", "Enter"):
        page.press(key)
    arrived(f"{run}/features/")
    page.wait("!!document.querySelector('.contexts li a')")
    for key in ("j", "Enter"):
        page.press(key)
    arrived(f"{run}/doc")
    tab_to(page, "main a[href*='/tokens-at/'], main a[href*='/tokens/']")
    page.press("Enter")
    arrived(f"{run}/tokens")
    for before in (f"{run}/doc", f"{run}/features/"):
        page.press("b")
        arrived(before)
    page.press("u")
    arrived(f"{run}/features?text={text}")
    for above in (run, "/"):
        page.press("u")
        page.wait(f"location.pathname == {json.dumps(above)} && document.readyState == 'complete'")
        seen.append(above)
    return seen


def strayed(page: Window, address: str) -> list[str]:
    """Requests that left the pages' server, and what was written into the console."""
    return [url for url in page.requests if not url.startswith((address, "data:", "about:"))] + page.messages


@contextlib.contextmanager
def browsing(store: Path) -> Iterator[str]:
    """Run `saeflow browse` on a free port, and nothing else; yields its address and ends it with Ctrl-C."""
    command = [*SAEFLOW, "browse", "--no-open", "--port", "0", "--store", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:"), f"saeflow browse says {address!r} instead of its address"
        yield address.rstrip("/")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdout.close()


def walk_through(store: Path) -> list[str]:
    """Serve a store by `saeflow browse` and walk through its pages; return what went wrong. Prints the way."""
    if CHROMIUM is None:
        return ["the pages were not walked through: there is no Chromium on this machine (apt-get install chromium)"]
    with (
        tempfile.TemporaryDirectory(prefix="saeflow-walk-", ignore_cleanup_errors=True) as folder,
        browsing(store) as address,
        window(Path(folder)) as page,
    ):
        try:
            print("walked by keyboard:", " → ".join(walk(page, address)))
        except (AssertionError, TimeoutError) as error:
            return [f"the walk through the pages stopped: {error}"]
        print(f"{len(page.requests)} requests, {len(page.messages)} console messages")
        return [f"the pages strayed: {each}" for each in strayed(page, address)]


if __name__ == "__main__":
    found = walk_through(Path(sys.argv[1]))
    print("\n".join(found) or "all keys lead on, nothing left this machine, the console is empty")
    sys.exit(1 if found else 0)
