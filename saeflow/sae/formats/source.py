"""Find out which program wrote an autoencoder, and what a recipe that names it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from saeflow.model.hook_names import site_of_hook
from saeflow.recipe.settings import PER_TOKEN, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.description import Files, Format, SAEFolder, Scale
from saeflow.sae.formats.dictionary_learning import describe_dictionary_learning
from saeflow.sae.formats.gemma_scope import describe_gemma_scope, describe_gemma_scope_2
from saeflow.sae.formats.hub import locate
from saeflow.sae.formats.llama_scope import describe_llama_scope
from saeflow.sae.formats.names import CFG, WEIGHTS
from saeflow.sae.formats.saelens import describe_saelens
from saeflow.sae.formats.single_files import describe_circuit_tracer, describe_torch_file
from saeflow.sae.formats.sparsify import describe_sparsify
from saeflow.sae.formats.tensors import shapes_in_words, shapes_of

SAE_FORMATS = (
    Format("saeflow, SAELens", CFG, WEIGHTS, describe_saelens),
    Format("sparsify", CFG, "sae.safetensors", describe_sparsify),
    Format("Llama Scope", "hyperparams.json", "checkpoints/*.safetensors", describe_llama_scope),
    Format("Llama Scope", "config.json", WEIGHTS, describe_llama_scope),
    Format("Gemma Scope", None, "params.npz", describe_gemma_scope),
    Format("Gemma Scope 2", "config.json", "params.safetensors", describe_gemma_scope_2),
    Format("dictionary_learning", "config.json", "ae.pt", describe_dictionary_learning),
    Format("circuit-tracer", None, "layer_*.safetensors", describe_circuit_tracer),
    Format("Qwen-Scope", None, "*.sae.pt", describe_torch_file),
    Format("others", None, "*.pt", describe_torch_file),
    Format("others", None, "*.pth", describe_torch_file),
)
"""Every layout that opens, in the order in which it is tried."""


def read_sae_folder(folder: Path, asked: SAEConfig | None = None, card: dict[str, object] | None = None) -> SAEFolder:
    """Read the settings. Raises UserError, which names the file and the setting, for one that cannot be followed."""
    wanted = folder.name if folder.is_file() else None
    inside = folder.parent if wanted else folder
    begun = None
    for each in SAE_FORMATS:
        settings = inside / each.settings if each.settings else None
        weights = sorted(path for path in inside.glob(each.weights) if path.is_file())
        if wanted:
            weights = [path for path in weights if wanted in (path.name, each.settings)]
        if len(weights) > 1 and "checkpoints" not in each.weights:
            raise UserError(
                f"{folder} holds {len(weights)} autoencoders: {_names_in_short([path.name for path in weights])}.\n"
                f"Name one of them, such as {weights[0]}."
            )
        if weights and (settings is None or settings.is_file()):
            files = Files(settings or weights[-1], weights[-1], asked or SAEConfig(), card or {})
            return each.describe(files)
        if begun is None and (weights or (settings and settings.is_file())):
            begun = each, each.weights if not weights else each.settings
    if begun:
        each, missing = begun
        raise UserError(f"No {missing} in {inside}. A trained autoencoder has {each.in_words}. {_found_in(inside)}")
    raise UserError(_not_understood(folder))


def describe_source(config: SAEConfig) -> SAEFolder:
    """Read what `sae.source` names: a folder, a file, or a name of the hub or of SAELens' catalogue."""
    assert config.source is not None
    path, card = locate(config.source)
    if not path.exists():
        raise UserError(
            f"sae.source is {config.source}, but there is no such folder.\nName the folder of a trained SAE, with "
            f"{', or '.join(each.in_words for each in SAE_FORMATS[:-2])}; or a name on the hub."
        )
    found = read_sae_folder(path, config, dict(card))
    if config.input_scale is not None:
        found = dataclasses.replace(found, scale=_asked_scale(config.input_scale, found))
    if hook := card.get("settings", {}).get("hook_name"):
        found = dataclasses.replace(found, hook=str(hook))
    said = {"l0", "variance_explained"} & card.keys()
    return dataclasses.replace(found, metadata=found.metadata | {name: card[name] for name in sorted(said)})


def _asked_scale(factor: float, found: SAEFolder) -> Scale:
    if found.scale != Scale():
        raise UserError(
            f"sae.input_scale is {factor}, but {found.settings} already names a factor: {found.scale.read:.6g}.\n"
            "Leave sae.input_scale out."
        )
    return Scale(factor, factor, keeps_values=True)


def effective_config(config: SAEConfig) -> SAEConfig:
    """Return the settings of the recipe's SAE, or of the folder in `sae.source` on the recipe's sites.

    Raises UserError for a setting that the recipe gives and the folder contradicts.
    """
    if config.source is None:
        return config
    found = describe_source(config)
    config = config.model_copy(update={"target_site": config.target_site or found.target_hook})
    _require_agreement(config, found)
    given = {"site": config.site, "target_site": config.target_site, "input_scale": config.input_scale}
    return found.config.model_copy(update=given | {"source": None})


def with_sites_of_source(config: SAEConfig, known: Sequence[str]) -> SAEConfig:
    """Return the settings with the sites that `sae.source` names, if the recipe names none and `known` holds them."""
    if config.source is None or (config.site and config.target_site):
        return config
    found = describe_source(config)
    named = {"site": site_of_hook(found.hook, known), "target_site": site_of_hook(found.target_hook, known)}
    return config.model_copy(update={name: getattr(config, name) or site for name, site in named.items()})


def hooks_of_sources(configs: Iterable[SAEConfig]) -> list[str]:
    """Return the names of the places that imported SAEs read and reconstruct. Raises UserError if one names none."""
    hooks: list[str] = []
    for config in (each for each in configs if each.source):
        found = describe_source(config)
        if found.hook is None:
            raise UserError(
                f"activations.sites is empty, and the SAE in {found.place} does not say where in the model it was "
                "trained.\nName the module in activations.sites."
            )
        hooks += [config.site or found.hook, *filter(None, [config.target_site or found.target_hook])]
    return list(dict.fromkeys(hooks))


def _require_agreement(asked: SAEConfig, found: SAEFolder) -> None:
    names = ["architecture", "n_features", *(["k"] if found.config.architecture in PER_TOKEN else [])]
    for name in names:
        value, there = getattr(asked, name), getattr(found.config, name)
        if value not in (there, SAEConfig.model_fields[name].default):
            raise UserError(
                f"sae.{name} is {value}, but the SAE in {found.place} has {there}.\n"
                f"Set sae.{name} to {there}, or leave it out: it comes from sae.source."
            )
    if (asked.target_site is None) != (found.config.target_site is None):
        what, remedy = "a", "Set it to the site that it reconstructs."
        if found.config.target_site is None:
            what, remedy = "no", "Leave it out: the SAE reconstructs what it reads."
        raise UserError(
            f"The SAE in {found.place} is {what} transcoder, but sae.target_site is {asked.target_site}.\n{remedy}"
        )


def _not_understood(folder: Path) -> str:
    return (
        f"No {CFG} in {folder}, nor other files of an autoencoder. saeflow understands "
        f"{', '.join(each.in_words for each in SAE_FORMATS)}.\n{_found_in(folder)}"
    )


def _found_in(folder: Path) -> str:
    """Name the files of a folder, with the tensors in them; or the autoencoders in folders inside."""
    if folder.is_file():
        return f"{folder.name} is a file that it does not read."
    inner = sorted(each.name for each in folder.iterdir() if each.is_dir() and _is_one(each))
    if inner:
        names = _names_in_short(inner)
        return f"There are autoencoders in the folders {names}: name one of them, such as {folder / inner[0]}."
    return f"Found: {'; '.join(_file_in_words(each) for each in sorted(folder.iterdir())[:8]) or 'nothing'}."


def _is_one(folder: Path) -> bool:
    return any(
        (each.settings is None or (folder / each.settings).is_file()) and any(folder.glob(each.weights))
        for each in SAE_FORMATS
    )


def _file_in_words(path: Path) -> str:
    if path.suffix not in (".safetensors", ".npz", ".pt", ".pth", ".bin") or not path.is_file():
        return path.name
    try:
        return f"{path.name} ({shapes_in_words(shapes_of(path))})"
    except UserError:
        return f"{path.name} (unreadable)"


def _names_in_short(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
