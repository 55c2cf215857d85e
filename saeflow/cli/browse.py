"""`saeflow browse`: the pages of a store in a browser."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from saeflow.cli.common import StoreOption, existing_store, print_line, print_note
from saeflow.runtime.errors import UserError

browse_commands = typer.Typer()

PORT = 8417
"""The port that is tried first."""


@browse_commands.command("browse")
def browse_command(
    store: StoreOption = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help=f"Port. Default: {PORT}, or a free one if that is taken.")
    ] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any other than 127.0.0.1 lets others on the network read all.")
    ] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the browser.")] = True,
) -> None:
    """Look at runs, features and documents in a browser. Ends with Ctrl-C.

    Example: `saeflow browse`
    """
    import uvicorn

    from saeflow.browser.server import LOOPBACK, application

    opened = existing_store(store)
    with _listen(host, port) as listening:
        number = listening.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        app = application(opened, (*LOOPBACK, name))
        print_line(f"http://{name}:{number}/")
        if name not in LOOPBACK:
            print_note("Everybody who reaches this address can read the corpus and change labels.", style="yellow")
        if open_:
            typer.launch(f"http://{name}:{number}/")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2)
        )
        server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in [port] if port else [PORT, 0]:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            return found
        except OSError as error:
            found.close()
            reason = error
    raise UserError(
        f"--host {host} --port {port}: nothing can listen there ({reason.strerror}). Choose another --port."
    )
