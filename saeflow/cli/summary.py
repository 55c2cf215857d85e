"""What a run prints at its end: its numbers, its sweep as a table, three answers, and the next commands."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

from saeflow.cli.answers.screen import render_table
from saeflow.cli.common import new_table, out, print_line, store_argument
from saeflow.pipeline import forecast
from saeflow.pipeline.judge import sweep
from saeflow.query.connection import connect
from saeflow.query.first_answers import READ_BY_ANSWERS, first_answers, next_commands, which_run
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.text import human_bytes, sanitise
from saeflow.store.store import Store

_MASSIVE_SHARE = 0.1
"""From this share of all squared lengths on, the longest 0.1% of the tokens are called massive."""


def print_summary(summary: dict[str, Any]) -> None:
    """Print what a run made, how good it is, and how long each stage took."""
    quality = summary["quality"]
    table = new_table("", "")
    table.show_header = False
    for name in ("n_documents", "n_tokens", "n_values"):
        table.add_row(name.removeprefix("n_"), f"{summary[name]:,}")
    for name in ("activation_bytes", "feature_bytes"):
        table.add_row(name.replace("_", " "), human_bytes(summary[name]))
    shares = "loss_recovered_zero", "loss_recovered_mean", "kl_recovered_mean"
    about_longest = "variance_unexplained_without_longest", "longest_share"
    for name in ("variance_unexplained", *about_longest, "l0", "shrinkage", "dead_share", *shares):
        if name in quality:
            missed = f" ({summary['l0_missed']})" if name == "l0" and "l0_missed" in summary else ""
            table.add_row(name.replace("_", " "), f"{quality[name]:.4f}{missed}")
    table.add_row("judged on", quality["judged_on"])
    for name, seconds in summary.get("seconds", {}).items():
        table.add_row(f"{name} took", f"{seconds:.1f} s")
    out.print_table(table)
    for doubt in summary["doubts"]:
        out.print(sanitise(doubt), style="yellow")
    if quality.get("longest_share", 0) > _MASSIVE_SHARE:
        out.print(
            f"The longest 0.1% of the tokens hold {quality['longest_share']:.0%} of all squared lengths (massive "
            "activations), so an SAE that fits only them looks good. Judge it by the variance unexplained without "
            "them. `activations.skip_norms_above = 10` leaves long vectors out.",
            style="yellow",
        )  # fmt: skip


def compare_with_forecast(store: Store, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Print forecast against actual, if this recipe was planned and this run did the work."""
    known = forecast.known_forecast(store, recipe)
    if known is None or summary["seconds"].get("collect", 0) < known.seconds / 20:
        return
    n_bytes = summary["activation_bytes"] + summary["feature_bytes"]
    foreseen = sum(stage.n_bytes for stage in known.stages if stage.name in ("collect", "encode"))
    seconds, peak = sum(summary["seconds"].values()), max(summary["peak_bytes"].values())
    table = new_table("", "forecast", "actual")
    table.add_row("activations and features", human_bytes(foreseen), human_bytes(n_bytes))
    table.add_row("peak memory", human_bytes(known.peak_bytes), human_bytes(peak))
    table.add_row("time", forecast.duration(known.seconds), forecast.duration(seconds))
    out.print_table(table)


def print_answers(store: Store, run: str) -> None:
    """Print three SQL answers, each under the command that gives it, and commands to try next."""
    which = which_run(store, run)
    with contextlib.closing(connect(store, run, names=READ_BY_ANSWERS)) as connection:
        for answer in first_answers(connection):
            asked = shlex.join(["saeflow", "ask", answer.question, *answer.arguments])
            print_line(f"\n$ {asked}{which}{store_argument(store)}", style="bold")
            render_table(answer.table, out)
    out.print("\nTry next:", style="bold")
    for line in next_commands(store, run, store_argument(store)):
        print_line(f"  {line}")


def print_sweep(table: dict[str, Any], recipe: Path, store: Store) -> None:
    """Print the SAEs of a sweep, each on one line, and the next command."""
    shown = new_table("SAE", "architecture", "sparsity", "features", "L0", "unexplained", "silent", "on the front")
    shown.columns[-1].no_wrap = True
    for row in table["saes"]:
        share = row["silent"] / row["n_features"]
        shown.add_row(
            row["member"], row["architecture"], row["sparsity"], f"{row['n_features']:,}", f"{row['l0']:.1f}",
            f"{row['variance_unexplained']:.4f}", f"{share:.1%}", "yes" if row["on_front"] else "",
        )  # fmt: skip
    out.print_table(shown, may_go=("architecture", "sparsity", "features", "silent") if out.is_terminal else ())
    for row in table["saes"]:
        if row.get("l0_missed"):
            print_line(f"{row['member']}: L0 is {row['l0_missed']}")
    out.print(f"judged on {table['saes'][0]['n_tokens']:,} tokens of {table['saes'][0]['judged_on']}")
    name = sweep.recommended(table["saes"])
    again = f"saeflow run {shlex.quote(str(recipe))} --member {name}{store_argument(store)}"
    print_line(f"Encode the corpus with one of them: {again}")
