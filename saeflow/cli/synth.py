"""The command that trains on made activations and says how much of what is known was found."""

from __future__ import annotations

import dataclasses
import itertools
import json
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
    a_table,
    create_store,
    out,
    progress_of,
    read_recipe,
)
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.store import Store

if TYPE_CHECKING:
    from saeflow.sae.recovery import Scores

commands = typer.Typer()

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
"""What a score is called, its field and how it is written, and what it means."""


@dataclass(frozen=True)
class Synth:
    """One trained autoencoder with its scores: its settings, and the artefact that holds it."""

    recipe: Recipe
    sae: str
    scores: Scores


@commands.command()
def synth(
    recipe: RecipePath,
    store: StoreOption = None,
    set_: Set = None,
    member: MemberOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make activations with known features, train on them, and score what was found.
    Example: `saeflow synth flows/recipes/synth.toml --set train.n_tokens=1_000_000`"""
    settings = read_recipe(recipe, set_, member)
    require_known(settings)
    opened = create_store(store, settings, quiet)
    found = judge(opened, [settings], progress_of(quiet, verbose, settings))
    if as_json:
        typer.echo(json.dumps([_plain(each) for each in found]))
    else:
        print_scores(found)


def require_known(recipe: Recipe) -> None:
    if recipe.activations.synthetic is None:
        raise UserError(
            f"The recipe {recipe.name} has no [activations.synthetic], so nobody knows its true features.\n"
            "Judge it on held-out documents with `saeflow run RECIPE`, or start from flows/recipes/synth.toml."
        )


def judge(store: Store, recipes: Sequence[Recipe], progress: Progress) -> list[Synth]:
    """Store each recipe's activations, train and score its autoencoder, or all of its sweep, trained in one reading.

    What is there already is kept, scores are not.
    """
    from saeflow.pipeline import import_table, train
    from saeflow.sae import interchange, recovery

    judged = []
    for recipe in recipes:
        require_known(recipe)
        assert recipe.activations.synthetic is not None
        import_table.run(store, recipe, progress)
        trained = train.run_all(store, recipe, progress)
        train.set_threads(recipe)
        truth = recovery.truth_of(recipe.activations.synthetic)
        for member, target in zip(recipe.members(), trained, strict=True):
            sae = interchange.load(target.fetched())
            judged.append(Synth(member, target.id, recovery.score(sae, truth, member.train.n_tokens)))
    return judged


def _plain(each: Synth) -> dict[str, object]:
    from saeflow.pipeline import import_sae

    about = {"name": each.recipe.name, "sae": each.sae, "architecture": import_sae.sae_config(each.recipe).architecture}
    return about | dataclasses.asdict(each.scores)


def print_scores(judged: Sequence[Synth]) -> None:
    """One autoencoder: its scores and what they mean. Several: a row each, and what the columns mean."""
    first = dataclasses.asdict(judged[0].scores)
    meanings = a_table("", "", "") if len(judged) == 1 else a_table("", "")
    meanings.show_header = False
    for name, (field, written, meaning) in _SCORES.items():
        value = [written.format(first[field])] if len(judged) == 1 else []
        meanings.add_row(name, *value, meaning.format_map(first))
    if len(judged) > 1:
        table = a_table("SAE", *_SCORES)
        table.padding = (0, 1, 0, 0)  # so that it fits 80 columns
        for name, each in zip(_names([each.recipe for each in judged]), judged, strict=True):
            found = dataclasses.asdict(each.scores)
            table.add_row(name, *(written.format(found[field]) for field, written, _ in _SCORES.values()))
        out.print(table)
        out.print()
    out.print(meanings)


def _names(recipes: Sequence[Recipe]) -> list[str]:
    """What tells them apart: their names without what all begin with, else what they are."""
    from saeflow.pipeline import import_sae

    names = [recipe.name for recipe in recipes]
    if len(set(names)) == len(names):
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = "".join(letters[0] for letters in alike).rpartition("_")[0]
        return [name.removeprefix(f"{shared}_") for name in names]
    configs = [import_sae.sae_config(recipe) for recipe in recipes]
    return [f"{config.architecture} {config.n_features:,}" for config in configs]
