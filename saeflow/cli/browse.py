"""The pages of a store in a browser, a static copy of them, and a report of a run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    MemberOption,
    Quiet,
    Set,
    StoreOption,
    Verbose,
    create_store,
    err,
    existing_store,
    print_line,
    print_note,
    read_recipe,
)
from saeflow.cli.run import run_stage
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import human_bytes, sanitise

if TYPE_CHECKING:
    from saeflow.browser.output import OutputFolder
    from saeflow.store.store import Store

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
    with listen(host, port) as listening:
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


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in [port] if port else [PORT, 0]:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            found.listen()  # the address is printed and opened before the server runs; who is quicker waits
            return found
        except OSError as error:
            found.close()
            reason = error
    raise UserError(
        f"--host {host} --port {port}: nothing can listen there ({reason.strerror}). Choose another --port."
    )


Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write into.")]


@browse_commands.command("report", rich_help_panel="Stages")
def report_command(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|RECIPE]", help="Name of a run, or a recipe file. Default: the newest run."),
    ] = None,
    output: Output = None,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a report of a run: one HTML file that opens anywhere, and its pictures as SVG and PNG.

    With a recipe, the picture beside the run's values is drawn, too. Default folder: report-RUN.

    Examples: `saeflow report my`, `saeflow report my.toml -o report`
    """
    if run is not None and (run.endswith(".toml") or Path(run).is_file()):
        opened, run = _draw(Path(run), store, set_, member, quiet, verbose)
    elif set_ or member:
        raise UserError("--set and --member change a recipe. Name a recipe file, or leave them out.")
    else:
        opened = existing_store(store)
    from saeflow.browser import report
    from saeflow.browser.connections import opened_alone
    from saeflow.browser.output import OutputFolder
    from saeflow.runtime.progress import Progress

    with opened_alone(opened, run) as about:
        folder = OutputFolder(output or Path(f"report-{about.run.schema}"), "report", report.REPORT_FILES)
        folder.prepare()
        with Progress(err, -1 if quiet else 0).bar("report", None, "panels") as bar:
            report.write_report(about, folder, bar.advance)
    _say_written(folder, "report.html", quiet)


def _draw(
    path: Path, store: str | None, set_: list[str] | None, member: str | None, quiet: bool, verbose: bool
) -> tuple[Store, str]:
    """Draw the picture of a recipe's run; return the store and the run."""
    from saeflow.pipeline.lineage import Lineage
    from saeflow.recipe.recipe import require_one

    settings = read_recipe(path, set_, member)
    require_one(settings, "report")
    run_stage("report", settings, store, quiet, verbose)
    opened = create_store(store, settings, quiet=True)
    return opened, Lineage(opened, settings).features.id


@browse_commands.command("export")
def export_command(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Name of a run. Default: the newest.")] = None,
    features: Annotated[int, typer.Option(min=1, help="How many features: the most telling ones.")] = 500,
    only: Annotated[
        str | None, typer.Option(metavar="3,17,99", help="These features instead of the most telling ones.")
    ] = None,
    output: Output = None,
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Write a static copy of a run's pages, which opens from a folder without saeflow or a network.

    An export that was stopped goes on where it was. Default folder: export-RUN.

    Example: `saeflow export my --features 100`
    """
    from saeflow.browser import export
    from saeflow.browser.connections import opened_alone
    from saeflow.browser.output import OutputFolder
    from saeflow.query.questions import parse_whole_numbers
    from saeflow.runtime.progress import Progress

    named = None if only is None else parse_whole_numbers("--only", only)
    with opened_alone(existing_store(store), run) as about:
        chosen = export.choose_features(about, named, features)
        folder = OutputFolder(output or Path(f"export-{about.run.schema}"), "export", export.EXPORT_FILES)
        folder.prepare()
        pages = export.Export(about, chosen, are_listed=only is None)
        with Progress(err, -1 if quiet else 0).bar("export", len(pages.files), "files") as bar:
            pages.write(folder, bar.advance)
    _say_written(folder, "index.html", quiet)


def _say_written(folder: OutputFolder, first: str, quiet: bool) -> None:
    """Print where the first page is, how large everything is, and what it holds."""
    files = folder.files()
    n_bytes = sum(path.stat().st_size for path in files)
    if not quiet:
        print_line(sanitise(f"{folder.path / first}"))
        print_line(f"{len(files)} files, {human_bytes(n_bytes)} ({n_bytes:,} bytes)")
        print_note("They hold text of the corpus. Share them only where the corpus may be shared.", style="yellow")
