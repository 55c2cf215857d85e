"""Tables beside the parts of a run: which features are alike, and which words they push (`directions`)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from saeflow.features import directions
from saeflow.features.files import write_table
from saeflow.features.schema import RUN_TABLES
from saeflow.model.sites import load_model
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.encoder import rounded
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder, replacing


def lacking(target: Artefact) -> list[str]:
    """Tables that the record names and the disk has not, or not in their size; all of them where there is no record, or
    an earlier one."""
    names = [f"{table}.parquet" for table in RUN_TABLES]
    if not target.exists():
        return names
    known = {file.name: file for file in target.record.files}
    wanted = [name for name in names if name in known] if names[0] in known else names
    return [name for name in wanted if name not in known or list(target.missing_files(target.path, [known[name]]))]


def write(target: Artefact, recipe: Recipe, sae: SparseAutoencoder, site: str, progress: Progress) -> list[str]:
    """Make what is lacking; the names of what was made. The logits need the model, if the recipe has one."""
    names, made = lacking(target), []
    make_folder(target.path)
    if names:
        progress.say("features: which features are alike, and which words they push")
    for name in names:
        table = directions.similar(sae.W_dec) if name == "similar.parquet" else _logits(recipe, sae, site)
        if table is not None:
            with replacing(target.path / name) as temporary:
                write_table(temporary, _rounded(table))
            made.append(name)
    return made


def _rounded(table: pa.Table) -> pa.Table:
    """Its last column, which is all numbers, with 11 significand bits, as values have: half the bytes."""
    number = len(table.schema) - 1
    numbers = torch.from_numpy(table.column(number).to_numpy().astype(np.float64))
    return table.set_column(number, table.schema.field(number), pa.array(rounded(numbers).numpy()))


def _logits(recipe: Recipe, sae: SparseAutoencoder, site: str) -> pa.Table | None:
    if recipe.model is None:
        return None
    return directions.logits(sae.W_dec, load_model(recipe.model), recipe.sae.target_site or site)
