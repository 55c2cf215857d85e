"""Tables beside the parts of a run: which features are alike, and which words they promote (`directions`)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from saeflow.features import directions
from saeflow.features.files import write_table
from saeflow.features.schema import RUN_TABLES
from saeflow.model.load import load_model
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import n_threads
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.encoding.exact import rounded
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder, replacing


def missing_tables(target: Artefact) -> list[str]:
    """Return the names of recorded tables that are missing or truncated; all names if the record predates them."""
    names = [f"{table}.parquet" for table in RUN_TABLES]
    if not target.exists():
        return names
    known = {file.name: file for file in target.record.files}
    wanted = [name for name in names if name in known] if names[0] in known else names
    return [name for name in wanted if name not in known or list(target.missing_files(target.path, [known[name]]))]


def write_run_tables(
    target: Artefact, recipe: Recipe, sae: SparseAutoencoder, site: str, progress: Progress
) -> list[str]:
    """Write the missing tables and return their names. The logits need the model, if the recipe has one."""
    names, made, blocks = missing_tables(target), [], directions.ProductBlocks(n_threads(recipe.threads))
    make_folder(target.path)
    if names:
        progress.say("features: which features are alike, and which words they push")
    for name in names:
        table = (
            directions.similar(sae.W_dec, blocks=blocks)
            if name == "similar.parquet"
            else _logits_table(recipe, sae, site, blocks)
        )
        if table is not None:
            with replacing(target.path / name) as temporary:
                write_table(temporary, _rounded_table(table))
            made.append(name)
    return made


def _rounded_table(table: pa.Table) -> pa.Table:
    """Round the numbers, which are in the last column, to 11 significand bits, as values are: half the bytes."""
    number = len(table.schema) - 1
    numbers = torch.from_numpy(table.column(number).to_numpy().astype(np.float64))
    return table.set_column(number, table.schema.field(number), pa.array(rounded(numbers).numpy()))


def _logits_table(
    recipe: Recipe, sae: SparseAutoencoder, site: str, blocks: directions.ProductBlocks
) -> pa.Table | None:
    if recipe.model is None:
        return None
    model = load_model(recipe.model)
    return directions.logits(sae.W_dec, model, recipe.sae.target_site or site, blocks=blocks)
