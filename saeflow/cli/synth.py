"""`saeflow synth`: train on made activations, and score how many of their known features were found."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from saeflow.cli.common import (
    MemberOption,
    Quiet,
    RecipePath,
    Set,
    StoreOption,
    Verbose,
    create_store,
    new_table,
    out,
    print_line,
    progress_of,
    read_recipe,
)
from saeflow.runtime.errors import UserError

if TYPE_CHECKING:
    from saeflow.recipe.recipe import Recipe
    from saeflow.runtime.progress import Progress
    from saeflow.runtime.terminal import Terminal
    from saeflow.sae.recovery import RecoveryScores
    from saeflow.store.store import Store

synth_commands = typer.Typer()

_SCORES = {
    "live": ("n_live", "{:,}", "features that fire at all on fresh rows"),
    "missed": (
        "variance_unexplained",
        "{:.4f}",
        "share of their variance unexplained; noise alone is {noise_floor:.4f}",
    ),
    "L0": ("l0", "{:.1f}", "features that fire in a row; in truth {true_l0:.1f}"),
    "cos": ("mean_max_cosine", "{:.3f}", "cosine of a true feature with the nearest live one, on average (MMCS)"),
    "found": ("found_share", "{:.3f}", "share of the {n_true:,} true features with a live one above cosine 0.9"),
    "freq.": ("found_share_frequent", "{:.3f}", "the same of the {n_frequent:,} that fire 1,000 times in training"),
    "prec.": ("precision", "{:.3f}", "precision: share of live features with a true one above cosine 0.9"),
    "MCC": ("mcc", "{:.3f}", "mean cosine of true and live features matched one to one"),
    "F1": ("f1", "{:.3f}", "does the matched feature fire when the true one does? mean over frequent ones"),
    "F1 w.": ("f1_weighted", "{:.3f}", "the same mean, weighted by how often they fire"),
}
"""Name of a score: its field, its format, and what it means."""


@dataclass(frozen=True)
class Synth:
    """One trained autoencoder: its recipe, the artefact that holds it, and its scores."""

    recipe: Recipe
    sae: str
    scores: RecoveryScores


@synth_commands.command("synth")
def synth_command(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make activations with known features, train on them, and score which features were found.

    Example: `saeflow synth flows/recipes/synth.toml --set train.n_tokens=1_000_000`
    """
    import json

    settings = read_recipe(recipe, set_, member)
    require_known(settings)
    opened = create_store(store, settings, quiet)
    found = train_and_score(opened, [settings], progress_of(quiet, verbose, settings))
    if as_json:
        print_line(json.dumps([_scores_as_json(each) for each in found]))
    else:
        print_scores(found)


def require_known(recipe: Recipe) -> None:
    """Refuse a recipe whose activations are not made, so that nobody knows their true features."""
    if recipe.activations.synthetic is None:
        raise UserError(
            f"The recipe {recipe.name} has no [activations.synthetic], so nobody knows its true features.\n"
            "Measure it on held-out documents with `saeflow run RECIPE`, or start from flows/recipes/synth.toml."
        )


def train_and_score(store: Store, recipes: Sequence[Recipe], progress: Progress) -> list[Synth]:
    """Store each recipe's activations, then train and score its autoencoder, or all of its sweep in one reading.

    Activations and autoencoders that exist are kept; scores are computed again.
    """
    from saeflow.activations.synthetic import truth_of
    from saeflow.pipeline import train
    from saeflow.pipeline.foreign import import_table
    from saeflow.pipeline.lineage import Lineage
    from saeflow.runtime.threads import n_threads, use_threads
    from saeflow.sae import recovery
    from saeflow.sae.formats.load import load_sae

    judged = []
    for recipe in recipes:
        require_known(recipe)
        assert recipe.activations.synthetic is not None
        lineage = Lineage(store, recipe)
        import_table.run(lineage, progress)
        trained = train.run_all(lineage, progress)
        use_threads(recipe.threads)
        truth = truth_of(recipe.activations.synthetic)
        for member, target in zip(recipe.members(), trained, strict=True):
            sae = load_sae(target.fetched(), n_threads(recipe.threads))
            judged.append(Synth(member, target.id, recovery.score_recovery(sae, truth, member.train.n_tokens)))
    return judged


def _scores_as_json(each: Synth) -> dict[str, object]:
    from saeflow.sae.formats.source import effective_config

    about = {
        "name": each.recipe.name,
        "sae": each.sae,
        "architecture": effective_config(each.recipe.sae).architecture,
    }
    return about | dataclasses.asdict(each.scores)


def print_scores(judged: Sequence[Synth], console: Terminal = out) -> None:
    """Print the scores of one autoencoder with their meanings, or of several as a table with the columns' meanings."""
    first = dataclasses.asdict(judged[0].scores)
    meanings = new_table("", "", "") if len(judged) == 1 else new_table("", "")
    meanings.show_header = False
    for name, (field, written, meaning) in _SCORES.items():
        value = [written.format(first[field])] if len(judged) == 1 else []
        meanings.add_row(name, *value, meaning.format_map(first))
    if len(judged) > 1:
        table = new_table("SAE", *_SCORES)
        table.padding = (0, 1, 0, 0)  # so that it fits 80 columns
        for name, each in zip(short_names([each.recipe for each in judged]), judged, strict=True):
            found = dataclasses.asdict(each.scores)
            table.add_row(name, *(written.format(found[field]) for field, written, _ in _SCORES.values()))
        console.print_table(table, may_go=list(_SCORES)[:1:-1])
        console.print()
    console.print_table(meanings)


def short_names(recipes: Sequence[Recipe]) -> list[str]:
    """Return names that tell recipes apart: their own without a common beginning, else architecture and size."""
    from saeflow.sae.formats.source import effective_config

    names = [recipe.name for recipe in recipes]
    if len(set(names)) == len(names):
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = "".join(letters[0] for letters in alike).rpartition("_")[0]
        return [name.removeprefix(f"{shared}_") for name in names]
    configs = [effective_config(recipe.sae) for recipe in recipes]
    return [f"{config.architecture} {config.n_features:,}" for config in configs]
