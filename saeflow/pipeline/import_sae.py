"""An autoencoder trained elsewhere, taken into the store (`sae.source`) instead of training one."""

from __future__ import annotations

import time

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from saeflow.activations import shards
from saeflow.corpus.selection import TokenSelection
from saeflow.model.sites import Site
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.sae import formats, interchange
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.metrics import Firing, Reconstruction
from saeflow.store.artefact import Artefact
from saeflow.store.files import replacing

_SAMPLE_ROWS = 4096
"""Tokens on which an imported SAE is tried."""


def require_fits(lineage: Lineage) -> None:
    """Refuse an SAE whose vectors are not as wide as the activations, and one for activations that are not there."""
    recipe, found = lineage.recipe, formats.describe_source(lineage.recipe.sae)
    lineage.activations.published()
    read, target = lineage.sites
    named = [("site", read, found.width), ("target_site", target, found.out_width)]
    for setting, site, width in named if recipe.sae.target_site else named[:1]:
        if site.width != width:
            fitting = [each.name for each in lineage.stored_sites if each.width == width]
            raise UserError(
                f"The SAE in {found.weights.parent} has vectors of {width}, but those of site {site.name} are of "
                f"{site.width}.\n"
                + (f"Set sae.{setting} to {' or '.join(fitting)}." if fitting else "Store the site it was trained on.")
            )


def publish(lineage: Lineage, progress: Progress) -> None:
    """Read the folder, try it on the first tokens, and publish it like an SAE trained here; its log has one row."""
    began, found = time.monotonic(), formats.describe_source(lineage.recipe.sae)
    sae = interchange.load(found.weights.parent)
    sae.config, sites = lineage.sae_config, lineage.distinct_sites
    progress.say(f"train: importing {found.weights.parent} instead")
    row = _try_on_sample(sae, _first_rows(lineage.selection(), lineage.activations, sites))
    named = dict(zip(("site", "target_site"), (site.name for site in sites), strict=False))
    theirs = {name: value for name, value in found.metadata.items() if name not in ("saeflow", *named)}
    provenance = {"seconds": time.monotonic() - began, "source": lineage.recipe.sae.source}
    inputs = [lineage.tokens.id, lineage.activations.id]
    with lineage.sae.publish_folder(lineage.sae_facts, inputs, provenance) as folder:
        interchange.save(sae, folder, theirs | named)
        with replacing(folder / "log.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist([row]), temporary, compression="zstd")


def in_words(source: SAEConfig, made: Artefact) -> str:
    """`SAELens: jumprelu, 24 neurons, 160 features, thresholds 0.1 to 2.5; L0 …`, of an SAE that was imported."""
    found, log = formats.describe_source(source), pq.read_table(made.own_file("log.parquet")).to_pylist()[0]
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


def _try_on_sample(sae: SparseAutoencoder, rows: list[Tensor]) -> dict[str, float]:
    firing, sums = Firing(sae.config.n_features), Reconstruction(rows[-1].shape[1])
    sparse = sae.encode_sparse(rows[0])
    firing.add(sparse)
    sums.add(rows[-1], sae.decode(sparse))
    return {
        "step": 0, "batch_rows": len(rows[0]), "l0": firing.l0 if len(rows[0]) else 0.0,
        "variance_unexplained": sums.variance_unexplained,
    }  # fmt: skip
