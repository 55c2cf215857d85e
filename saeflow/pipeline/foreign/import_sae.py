"""An SAE trained elsewhere: does it fit, what does it explain, and what is odd about it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saeflow.activations import shards
from saeflow.activations.lengths import longest_allowed, without_long
from saeflow.model.hook_names import is_understood, site_of_hook
from saeflow.model.sites import Site
from saeflow.pipeline.collect import forward_of
from saeflow.pipeline.judge.evaluate import Judged
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.settings import PER_TOKEN, SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.description import SAEFolder
from saeflow.sae.formats.load import load_described, load_sae
from saeflow.sae.formats.readings import best_reading
from saeflow.sae.formats.source import describe_source
from saeflow.sae.metrics import Firing, Reconstruction, WithoutLongest
from saeflow.store.artefact import Artefact
from saeflow.store.files import read_json
from saeflow.train.group import write_sae

_TRIED_ROWS = 4096
"""Tokens on which an imported SAE is tried."""
_POOR, _FAR, _FAR_BETTER = 0.5, 2.0, 0.35
"""Variance unexplained above which an import is called poor; how many times another L0 than the stated one is; and the
share of the variance unexplained at most left by another reading that is named although nothing else is odd."""


def require_fits(lineage: Lineage) -> None:
    """Raise UserError if an SAE's vectors are not as wide as the activations, or if there are no activations."""
    found = describe_source(lineage.recipe.sae)
    lineage.activations.published()
    read, target = lineage.sites
    named = [("site", read, found.width), ("target_site", target, found.out_width)]
    for setting, site, width in named if lineage.sae_config.target_site else named[:1]:
        if site.width != width:
            fitting = [each.name for each in lineage.stored_sites if each.width == width]
            raise UserError(
                f"The SAE in {found.place} has vectors of {width}, but those of site {site.name} are of "
                f"{site.width}.\n"
                + (f"Set sae.{setting} to {' or '.join(fitting)}." if fitting else "Store the site it was trained on.")
            )


def run(lineage: Lineage, progress: Progress) -> None:
    """Try the SAE in `sae.source` on the first tokens, and publish it like one trained here. Its log has one row."""
    began, found = time.monotonic(), describe_source(lineage.recipe.sae)
    sae = load_described(found, n_threads(lineage.recipe.threads))
    sae.config, sites = lineage.sae_config, lineage.distinct_sites
    if sae.config.target_site is not None:
        sae.config = sae.config.model_copy(update={"target_site": sites[-1].name})
    progress.say(f"train: importing {found.place} instead")
    x, *others = _first_rows(lineage, sites)
    wanted = others[0] if others else x
    judged = _tried_on(sae, x, wanted)
    if not math.isfinite(judged.reconstruction.error):
        raise UserError(
            f"The SAE in {found.place} gives NaN or infinite values on the first tokens: it is not imported.\n"
            "Was it trained on activations of this site, at this scale?"
        )
    figures = {
        "l0": judged.firing.l0 if len(x) else 0.0,
        "variance_unexplained": judged.reconstruction.variance_unexplained,
    }
    looks_like = _doubts(lineage, found, sae, figures, x, wanted)
    for doubt in looks_like:
        progress.say(f"train: the SAE in {found.place}: {doubt}")
    silent = judged.firing.silent / sae.config.n_features
    check = {"silent": silent, "stated": _stated(found), "looks_like": looks_like}
    theirs = {name: value for name, value in found.metadata.items() if name != "saeflow"}
    provenance = {"seconds": time.monotonic() - began, "source": lineage.recipe.sae.source, "check": figures | check}
    inputs = [lineage.tokens.id, lineage.activations.id]
    with lineage.sae.publish_folder(lineage.sae_facts, inputs, provenance) as folder:
        write_sae(folder, sae, sites, theirs, [{"step": 0, "batch_rows": len(x), **figures}])


def _tried_on(sae: SparseAutoencoder, x: Tensor, wanted: Tensor) -> Judged:
    width = wanted.shape[1]
    judged = Judged(Reconstruction(width), WithoutLongest(width, len(x)), Firing(sae.config.n_features))
    judged.add(x, wanted, sae)
    return judged


def _doubts(
    lineage: Lineage, found: SAEFolder, sae: SparseAutoencoder, figures: Mapping[str, float], x: Tensor, wanted: Tensor
) -> list[str]:
    """Say what is odd about an SAE: the place where it was trained, its figures, and what explains them."""
    doubts, unexplained = [], figures["variance_unexplained"]
    site = lineage.site.name
    if is_understood(found.hook) and site_of_hook(found.hook, [site]) is None:
        doubts.append(f"it was trained on {found.hook}, but sae.site is {site}")
    stated = _stated(found).get("l0")
    far = stated is not None and not 1 / _FAR <= max(figures["l0"], 1e-9) / stated <= _FAR
    if far:
        doubts.append(f"L0 is {figures['l0']:.1f} on the first tokens, but it says {stated:g}")
    if unexplained > _POOR:
        doubts.append(f"it leaves {unexplained:.0%} of the variance unexplained on the first tokens")
    best = best_reading(sae, x, wanted, unexplained)
    if best and (doubts or best[1] < _FAR_BETTER * unexplained):
        return [*doubts, f"it looks as if {best[0]} (variance unexplained would be {best[1]:.3f})"]
    others = _better_sites(lineage, sae, unexplained) if doubts else []
    doubts += [f"it explains more at {name} (variance unexplained {left:.3f})" for name, left in others]
    return doubts


def _better_sites(lineage: Lineage, sae: SparseAutoencoder, unexplained: float) -> list[tuple[str, float]]:
    """Return the stored site at which an SAE leaves much less unexplained, if it is one of the same width."""
    if sae.config.target_site is not None:
        return []
    others = [each for each in lineage.stored_sites if each != lineage.site and each.width == sae.W_enc.shape[1]]
    rows = _first_rows(lineage, others) if others else []
    tried = [
        (_tried_on(sae, x, x).reconstruction.variance_unexplained, e.name) for e, x in zip(others, rows, strict=True)
    ]
    return [(name, left) for left, name in sorted(tried)[:1] if left < 0.6 * unexplained and left < 0.8]


def _stated(found: SAEFolder) -> dict[str, float]:
    """Return the figures that the folder or a catalogue says."""
    about = found.metadata
    given = {"l0": next((about[name] for name in ("l0", "target_l0", "k", "top_k") if name in about), None),
             "variance_explained": about.get("variance_explained")}  # fmt: skip
    if found.config.architecture in PER_TOKEN:
        given["l0"] = found.config.k
    return {name: float(value) for name, value in given.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0}  # fmt: skip


def doubts_in_words(made: Artefact) -> list[str]:
    """Return what was odd about an SAE when it was imported; nothing for one that was trained here."""
    check: dict[str, Any] = read_json(made.own_file("provenance.json")).get("check", {})
    return [f"Look at this: {doubt}." for doubt in check.get("looks_like", [])]


def import_in_words(source: SAEConfig, made: Artefact) -> str:
    """Describe an imported SAE: `SAELens: jumprelu, 24 neurons, 160 features, thresholds 0.1 to 2.5; L0 …`."""
    found, log = describe_source(source), pq.read_table(made.own_file("log.parquet")).to_pylist()[0]
    config = found.config
    width = f"{found.width:,} neurons" + (f" to {found.out_width:,}" if config.target_site else "")
    words = [f"{found.writer}: {config.architecture}", width, f"{config.n_features:,} features"]
    if config.architecture in PER_TOKEN:
        words.append(f"k {config.k}")
    elif config.architecture not in ("relu", "gated"):
        threshold = load_sae(made.fetched()).threshold
        least, most = threshold.min().item(), threshold.max().item()
        words.append(f"threshold {least:.4g}" if least == most else f"thresholds {least:.4g} to {most:.4g}")
    if found.skips:
        words.append("a skip connection")
    check: dict[str, Any] = read_json(made.own_file("provenance.json")).get("check", {})
    stated = "".join(f"; it says {name.replace('_', ' ')} {value:g}" for name, value in check.get("stated", {}).items())
    silent = f", silent {check['silent']:.0%} of features" if check else ""
    tried = (
        f"On the first {log['batch_rows']:,} tokens: L0 {log['l0']:.1f}, variance unexplained "
        f"{log['variance_unexplained']:.3f}{silent}{stated}"
    )
    return "\n".join([", ".join(words), tried, *doubts_in_words(made)])


def _first_rows(lineage: Lineage, sites: list[Site]) -> list[Tensor]:
    """Return the first used tokens (n, D) of the store, at most `_TRIED_ROWS`, one tensor for each site."""
    used, stored = lineage.selection(), lineage.activations
    part = stored.published().parts[0]
    sequences = slice(0, max(1, _TRIED_ROWS // used.length))
    mask = used.mask(part.index, sequences)
    if forward := forward_of(lineage, sites):
        wanted = np.zeros((part.counts["n_sequences"], used.length), bool)
        wanted[sequences] = mask
        batches = forward.selected(used.parts[part.index], wanted, lambda _, values: values)
        found = [torch.cat(each).cpu() for each in zip(*batches, strict=True)]
    else:
        keep = mask.reshape(-1).nonzero()[0]
        found = [shards.open_site(stored, part, site).read(sequences).flatten(0, 1)[keep] for site in sites]
    return [each.float() for each in without_long(found, longest_allowed(used, stored, sites[0]))]
