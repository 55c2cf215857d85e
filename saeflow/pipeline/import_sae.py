"""An autoencoder trained elsewhere, taken into the store (`sae.source`) instead of training one."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from saeflow.activations import shards
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.pipeline import collect
from saeflow.recipe.fingerprint import settings_that_count
from saeflow.recipe.recipe import Recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.sae import formats, interchange
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats import Described
from saeflow.sae.metrics import Firing, Reconstruction
from saeflow.store.artefact import Artefact
from saeflow.store.files import checksum, replacing
from saeflow.store.store import Store

_SAMPLE_ROWS = 4096
"""Tokens on which an imported SAE is tried."""


def described(recipe: Recipe) -> Described:
    """What the folder says that `sae.source` names."""
    assert recipe.sae.source is not None
    folder = Path(recipe.sae.source)
    if not folder.is_dir():
        raise UserError(
            f"sae.source is {recipe.sae.source}, but there is no such folder.\nName the folder of a trained SAE, with "
            f"{formats.CFG} and {formats.WEIGHTS}, or with {formats.THEIR_CFG} and {formats.THEIR_WEIGHTS}."
        )
    return formats.describe(folder)


def sae_config(recipe: Recipe) -> SAEConfig:
    """What the recipe's SAE is: its own settings, or those of the folder in `sae.source`, on the recipe's sites.

    A setting that the recipe gives, and the folder contradicts, is refused.
    """
    if recipe.sae.source is None:
        return recipe.sae
    found = described(recipe)
    _require_agreement(recipe.sae, found)
    sites = {"site": recipe.sae.site, "target_site": recipe.sae.target_site}
    return found.config.model_copy(update=sites | {"source": None})


def _require_agreement(asked: SAEConfig, found: Described) -> None:
    names = ["architecture", "n_features", *(["k"] if found.config.architecture == "topk" else [])]
    for name in names:
        value, there = getattr(asked, name), getattr(found.config, name)
        if value not in (there, SAEConfig.model_fields[name].default):
            raise UserError(
                f"sae.{name} is {value}, but the SAE in {found.weights.parent} has {there}.\n"
                f"Set sae.{name} to {there}, or leave it out: it comes from sae.source."
            )
    if (asked.target_site is None) != (found.config.target_site is None):
        is_one = found.config.target_site is not None
        raise UserError(
            f"The SAE in {found.weights.parent} is {'a' if is_one else 'no'} transcoder, but sae.target_site is "
            f"{asked.target_site}.\n"
            + (
                "Set it to the site that it reconstructs."
                if is_one
                else "Leave it out: the SAE reconstructs what it reads."
            )
        )


def facts(store: Store, recipe: Recipe) -> dict[str, Any]:
    """What makes an imported SAE the same: the bytes of its two files, and the activations it is used on."""
    found = described(recipe)
    files = {"settings": found.settings, "weights": found.weights}
    return {
        "activations": collect.artefact(store, recipe).fp,
        "sae": settings_that_count(sae_config(recipe)),
        "imported": {name: _digest(path) for name, path in files.items()},
    }


def _digest(path: Path) -> str:
    about = path.stat()
    return _digest_of(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=8)
def _digest_of(path: Path, n_bytes: int, changed: int) -> str:
    return checksum(path)


def require_fits(store: Store, recipe: Recipe) -> None:
    """Refuse an SAE whose vectors are not as wide as the activations, and one for activations that are not there."""
    found, stored = described(recipe), collect.artefact(store, recipe)
    stored.published()
    read, target = collect.sites_of(stored, recipe.sae)
    named = [("site", read, found.width), ("target_site", target, found.out_width)]
    for setting, site, width in named if recipe.sae.target_site else named[:1]:
        if site.width != width:
            fitting = [each.name for each in collect.stored_sites(stored) if each.width == width]
            raise UserError(
                f"The SAE in {found.weights.parent} has vectors of {width}, but those of site {site.name} are of "
                f"{site.width}.\n"
                + (f"Set sae.{setting} to {' or '.join(fitting)}." if fitting else "Store the site it was trained on.")
            )


def publish(target: Artefact, store: Store, recipe: Recipe, progress: Progress) -> None:
    """Read the folder, try it on the first tokens, and publish it as if it had been trained here, with one row of
    log."""
    began, found = time.monotonic(), described(recipe)
    sae = interchange.load(found.weights.parent)
    sae.config = sae_config(recipe)
    source, stored = collect.tokens_artefact(store, recipe), collect.artefact(store, recipe)
    sites = list(dict.fromkeys(collect.sites_of(stored, recipe.sae)))
    progress.say(f"train: importing {found.weights.parent} instead")
    row = _tried(sae, _first_rows(TokenSelection.of(source, recipe.activations), stored, sites))
    named = dict(zip(("site", "target_site"), (site.name for site in sites), strict=False))
    about = facts(store, recipe)
    theirs = {name: value for name, value in found.metadata.items() if name not in ("saeflow", *named)}
    provenance = {"seconds": time.monotonic() - began, "source": recipe.sae.source}
    with target.publish_folder(about, [source.id, stored.id], provenance) as folder:
        interchange.save(sae, folder, theirs | named)
        with replacing(folder / "log.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist([row]), temporary, compression="zstd")


def in_words(recipe: Recipe, made: Artefact) -> str:
    """`SAELens: jumprelu, 24 neurons, 160 features, thresholds 0.1 to 2.5; L0 …`, of an SAE that was imported."""
    found, log = described(recipe), pq.read_table(made.own_file("log.parquet")).to_pylist()[0]
    config = found.config
    width = f"{found.width:,} neurons" + (f" to {found.out_width:,}" if config.target_site else "")
    words = [f"{found.writer}: {config.architecture}", width, f"{config.n_features:,} features"]
    if config.architecture == "topk":
        words.append(f"k {config.k}")
    elif config.architecture not in ("relu", "gated"):
        threshold = interchange.load(made.fetched()).threshold
        least, most = threshold.min().item(), threshold.max().item()
        words.append(f"threshold {least:.4g}" if least == most else f"thresholds {least:.4g} to {most:.4g}")
    return (
        f"{', '.join(words)}\n"
        f"On the first {log['batch_rows']:,} tokens: L0 {log['l0']:.1f}, variance unexplained "
        f"{log['variance_unexplained']:.3f}"
    )


def _first_rows(used: TokenSelection, stored: Artefact, sites: list[Site]) -> list[Tensor]:
    """The first used tokens (n, D) of the store, at most `_SAMPLE_ROWS`; a tensor a site."""
    part = stored.published().parts[0]
    sequences = slice(0, max(1, _SAMPLE_ROWS // used.length))
    keep = used.mask(part.index, sequences).reshape(-1).nonzero()[0]
    return [shards.open_site(stored, part, site).read(sequences).flatten(0, 1)[keep].float() for site in sites]


def _tried(sae: SparseAutoencoder, rows: list[Tensor]) -> dict[str, float]:
    firing, sums = Firing(sae.config.n_features), Reconstruction(rows[-1].shape[1])
    sparse = sae.encode_sparse(rows[0])
    firing.add(sparse)
    sums.add(rows[-1], sae.decode(sparse))
    return {
        "step": 0, "batch_rows": len(rows[0]), "l0": firing.l0 if len(rows[0]) else 0.0,
        "variance_unexplained": sums.variance_unexplained,
    }  # fmt: skip
