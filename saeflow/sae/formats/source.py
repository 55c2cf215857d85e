"""Find out which program wrote the folder of an autoencoder, and what a recipe that names it means."""

from __future__ import annotations

from pathlib import Path

from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import SAEFolder
from saeflow.sae.formats.dictionary_learning import THEIR_CFG, THEIR_WEIGHTS, describe_dictionary_learning
from saeflow.sae.formats.saelens import CFG, WEIGHTS, describe_saelens


def read_sae_folder(folder: Path) -> SAEFolder:
    """Read the settings. Raises UserError, which names the file and the setting, for one that cannot be followed."""
    for settings, weights, read in (
        (CFG, WEIGHTS, describe_saelens),
        (THEIR_CFG, THEIR_WEIGHTS, describe_dictionary_learning),
    ):
        if any((folder / name).is_file() for name in (settings, weights)):
            for name in (settings, weights):
                if not (folder / name).is_file():
                    raise UserError(f"No {name} in {folder}. A trained autoencoder has {settings} and {weights}.")
            return read(folder / settings, folder / weights)
    raise UserError(
        f"No {CFG} in {folder}. An autoencoder is a folder with {CFG} and {WEIGHTS} (saeflow, SAELens), or with "
        f"{THEIR_CFG} and {THEIR_WEIGHTS} (dictionary_learning)."
    )


def describe_source(config: SAEConfig) -> SAEFolder:
    """Read the folder that `sae.source` names."""
    assert config.source is not None
    folder = Path(config.source)
    if not folder.is_dir():
        raise UserError(
            f"sae.source is {config.source}, but there is no such folder.\nName the folder of a trained SAE, with "
            f"{CFG} and {WEIGHTS}, or with {THEIR_CFG} and {THEIR_WEIGHTS}."
        )
    return read_sae_folder(folder)


def effective_config(config: SAEConfig) -> SAEConfig:
    """Return the settings of the recipe's SAE, or of the folder in `sae.source` on the recipe's sites.

    Raises UserError for a setting that the recipe gives and the folder contradicts.
    """
    if config.source is None:
        return config
    found = describe_source(config)
    _require_agreement(config, found)
    sites = {"site": config.site, "target_site": config.target_site}
    return found.config.model_copy(update=sites | {"source": None})


def _require_agreement(asked: SAEConfig, found: SAEFolder) -> None:
    names = ["architecture", "n_features", *(["k"] if found.config.architecture == "topk" else [])]
    for name in names:
        value, there = getattr(asked, name), getattr(found.config, name)
        if value not in (there, SAEConfig.model_fields[name].default):
            raise UserError(
                f"sae.{name} is {value}, but the SAE in {found.weights.parent} has {there}.\n"
                f"Set sae.{name} to {there}, or leave it out: it comes from sae.source."
            )
    if (asked.target_site is None) != (found.config.target_site is None):
        what, remedy = "a", "Set it to the site that it reconstructs."
        if found.config.target_site is None:
            what, remedy = "no", "Leave it out: the SAE reconstructs what it reads."
        raise UserError(
            f"The SAE in {found.weights.parent} is {what} transcoder, but sae.target_site is {asked.target_site}.\n"
            f"{remedy}"
        )
