"""What changes in the model when a feature is changed: `saeflow effects`, `saeflow steer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    Quiet,
    StoreOption,
    err,
    existing_store,
    new_table,
    out,
    print_line,
    print_note,
    store_argument,
)
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import harmless_lines, sanitise

if TYPE_CHECKING:
    from saeflow.store.store import Store

effect_commands = typer.Typer()

_Device = Annotated[str, typer.Option("--device", help="Device of the model: `auto`, `cpu` or `cuda`.")]
_Model = Annotated[
    str, typer.Option("--model", metavar="FOLDER", help="The model's folder, if it is not where it was.")
]


@effect_commands.command("effects")
def effects_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run.")],
    features: Annotated[
        str, typer.Option("--features", metavar="3,17,40-59", help="Numbers and ranges of features, or `all`.")
    ],
    n: Annotated[int, typer.Option("--n", help="Firings of each feature, from all bands alike. 0: all firings.")] = 200,
    change: Annotated[
        str, typer.Option("--change", help="What the feature becomes: zero, mean, max*2 (or 2x), same, or a number.")
    ] = "zero",
    ahead: Annotated[int, typer.Option("--ahead", help="Tokens after the changed one that are compared, too.")] = 3,
    bands: Annotated[int, typer.Option("--bands", help="Quantile bands that firings are drawn from.")] = 10,
    top: Annotated[int, typer.Option("--top", help="Entries kept of each prediction: this many up, and down.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="Run the model in its own precision, not in float64: quicker, less exact.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="Name of the measurement. Default: that of the change.")] = "",
    model: _Model = "",
    device: _Device = "auto",
    store: StoreOption = None,
    quiet: Quiet = False,
) -> None:
    """Measure what the model does when features are changed: loss, KL divergence, and the tokens most moved.

    Each firing is changed alone. What the SAE misses stays as it is. The table is kept in the store as effects/NAME; a
    run that is stopped goes on where it was.

    Example: `saeflow effects my --features 0-99 --n 50`
    """
    from saeflow.meaning.effects.measure import EffectSettings, measure_effects
    from saeflow.runtime.progress import Progress

    opened = existing_store(store)
    settings = EffectSettings(features, change, n, bands, ahead, top, seed, fast, name)
    made = measure_effects(opened, run, settings, Progress(err, -1 if quiet else 0), device, model)
    if quiet:
        return
    _show_largest(opened, run, made.artefact.name)
    print_line(sanitise(str(made.artefact.path)))
    shown = f"saeflow sql 'from feature_effects order by mean_kl desc' --run {run}{store_argument(opened)}"
    print_note(sanitise(f"All of them: {shown}"))


_LARGEST_EFFECTS = """
select feature_id, n_firings, mean_loss_change, loss_change_low, loss_change_high, mean_kl
from feature_effects where effect = ? and ahead = 0 order by mean_kl desc, feature_id limit 10
"""


def _show_largest(store: Store, run: str, effect: str) -> None:
    from saeflow.query.ask import query
    from saeflow.query.connection import connect

    with connect(store, run, names=("feature_effects",)) as connection:
        rows = query(connection, _LARGEST_EFFECTS, [effect]).to_pylist()
    table = new_table("feature", "firings", "loss change", "95% interval", "KL")
    for row in rows:
        ends = (row["loss_change_low"], row["loss_change_high"])
        interval = "" if None in ends else " to ".join(f"{end:+.4f}" for end in ends)
        loss = "" if row["mean_loss_change"] is None else f"{row['mean_loss_change']:+.4f}"
        table.add_row(str(row["feature_id"]), f"{row['n_firings']:,}", loss, interval, f"{row['mean_kl']:.4f}")
    out.print_table(table)


@effect_commands.command("steer")
def steer_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run.")],
    words: Annotated[
        list[str], typer.Argument(metavar="FEATURE=VALUE… TEXT", help="Features and their values, then the text.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to add at most.")] = 40,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token each time; 1 draws as the model does.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    model: _Model = "",
    device: _Device = "auto",
    store: StoreOption = None,
) -> None:
    """Continue a text with features set, beside the continuation without.

    A value has the units of the feature; 3x is three times its maximum. The features have their values at every token,
    those of the text too. What the SAE misses stays as it is.

    Example: `saeflow steer my 12=3x "The old sailor"`
    """
    from saeflow.meaning.effects.steer import SteerSettings, parse_assignments, steer

    if len(words) < 2:
        raise UserError('Name a feature and a text: saeflow steer RUN 12=3x "The old sailor"')
    changes = parse_assignments(words[:-1])
    settings = SteerSettings(tokens, temperature, seed)
    made = steer(existing_store(store), run, changes, words[-1], settings, device, model)
    for feature, value in sorted(made.values.items()):
        print_note(f"feature {feature} is {'left as it is' if value is None else f'set to {value:.4g}'}")
    print_line("unchanged", style="bold")
    print_line(harmless_lines(made.prompt + made.unchanged))
    print_line("\nsteered", style="bold")
    print_line(harmless_lines(made.prompt + made.steered))
