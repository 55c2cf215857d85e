"""Tables beside the parts of a run: features that are alike, and the words they promote.

Both follow from directions, without any values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from saeflow.features.files import write_table
from saeflow.features.schema import RUN_TABLES, TOP, TOP_LOGITS
from saeflow.model.direct_path import direct_path
from saeflow.model.hook_names import site_of_hook
from saeflow.model.load import load_model, may_run
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.linear import linear
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import in_parallel, n_threads, ranges
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.exact import rounded
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder, replacing

Directions = Tensor | np.ndarray


class ProductBlocks(NamedTuple):
    """Workers, and the rows and columns of a block of products that one of them holds at once: 16 MiB."""

    threads: int = 1
    rows: int = 256
    columns: int = 16384


ONE_WORKER = ProductBlocks()


def similar(directions: Directions, top: int = TOP, blocks: ProductBlocks = ONE_WORKER) -> pa.Table:
    """Return for each feature the `top` others whose directions (F, D) have the largest cosine with its own.

    Ordered by feature, then cosine, largest first, then the other feature. Directions without length have no rows.
    Memory is a copy of the directions and a few blocks.
    """
    rows, ids = _with_length(directions)
    unit = rows / torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64, keepdim=True).float()
    k = min(top, max(len(unit) - 1, 0))
    ((cosines, others),) = _largest_products(unit, unit, k, blocks, among_themselves=True)
    return _direction_table("similar", ids, ids[others.numpy()], cosines)


@torch.no_grad()
def logits(
    directions: Directions,
    model: nn.Module,
    site: str,
    top: int = TOP_LOGITS,
    blocks: ProductBlocks = ONE_WORKER,
    n_vocab: int | None = None,
) -> pa.Table | None:
    """Return for each feature the `top` vocabulary entries that its direction at `site` raises most, and lowers most.

    None where the model has no logits, or no direct path leads there from the site. Logits are those of a direction as
    it is, less their mean over the vocabulary: the first `n_vocab` entries, as the tokenizer gives no others. Ordered
    by feature, then logit, largest first, then entry. Left out are later layers, biases, a cap on logits, and what the
    norms divide by at a token: true logits are these times a positive number, which differs from token to token but not
    among the entries. Directions without length have no rows. Memory is a copy of the directions (two, where a module
    lies between site and stream) and a few blocks.
    """
    path = direct_path(model, site)
    if path is None:
        return None
    rows, ids = _with_length(directions)
    parts = in_parallel(lambda part: path.apply(rows[slice(*part)]), ranges(len(rows), blocks.rows), blocks.threads)
    stream = torch.cat([torch.zeros(0, path.unembedding.shape[1]), *parts])
    unembedding = path.unembedding[:n_vocab]
    n = min(top, len(unembedding) // 2)
    mean = stream @ unembedding.mean(0, dtype=torch.float32).cpu()
    (up, up_ids), (down, down_ids) = _largest_products(stream, unembedding, n, blocks, signs=(1, -1))
    values, entries = _largest_first(torch.cat([up, -down], 1) - mean[:, None], torch.cat([up_ids, down_ids], 1))
    return _direction_table("logits", ids, entries.numpy(), values)


def _with_length(directions: Directions) -> tuple[Tensor, np.ndarray]:
    """Return the directions that have a length, in float32, and their ids."""
    if isinstance(directions, np.ndarray):
        directions = torch.from_numpy(np.require(directions, requirements="W"))  # torch warns of those it may not write
    rows = directions.detach().float().cpu()
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    alive = lengths.isfinite() & (lengths > 0)
    ids = alive.nonzero().flatten().int().numpy()
    return rows if alive.all() else rows[alive], ids


def _direction_table(name: str, ids: np.ndarray, others: np.ndarray, values: Tensor) -> pa.Table:
    owners = np.repeat(ids, others.shape[1])
    return pa.table([owners, others.ravel().astype(np.int32), values.numpy().ravel()], schema=RUN_TABLES[name])


def _largest_products(
    rows: Tensor, others: Tensor, k: int, blocks: ProductBlocks, signs: Sequence[int] = (1,),
    among_themselves: bool = False,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return for each sign the k largest of sign × rows (n, d) @ others (m, d).T in each row, and their columns (n, k).

    Largest first; among equals, the lower column. With `among_themselves` no row is compared with itself, and products
    are cosines.
    """
    best = [(torch.full((len(rows), k), -torch.inf), torch.zeros(len(rows), k, dtype=torch.int64)) for _ in signs]
    for start, stop in ranges(len(others), blocks.columns):
        columns = others[start:stop].float().cpu()

        def compare(part: tuple[int, int], columns: Tensor = columns, start: int = start) -> None:
            block = slice(*part)
            products = linear(rows[block], columns)
            if among_themselves:
                products.clamp_(-1, 1).diagonal(part[0] - start).fill_(-torch.inf)
            for sign, (values, ids) in zip(signs, best, strict=True):
                found, places = _largest(products if sign > 0 else products.neg_(), k)
                both = torch.cat([values[block], found], 1), torch.cat([ids[block], places + start], 1)
                order = both[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
                values[block], ids[block] = (each.gather(1, order) for each in both)

        in_parallel(compare, ranges(len(rows), blocks.rows), blocks.threads)
    return best


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each row's k largest values, or all, largest first, and their columns; among equals, the lower column."""
    k = min(k, values.shape[1])
    found, ids = values.topk(min(k + 1, values.shape[1]), dim=1)
    if k < found.shape[1]:
        tied = (found[:, k - 1] == found[:, k]).nonzero().flatten() if k else ids.new_empty(0)
        found, ids = found[:, :k].contiguous(), ids[:, :k].contiguous()
        ids[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _largest_first(values.gather(1, ids), ids)


def _largest_first(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's values, largest first, with their ids; equal ones by id."""
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def missing_tables(target: Artefact) -> list[str]:
    """Return the names of recorded tables that are missing or truncated; all names if the record predates them."""
    names = [f"{table}.parquet" for table in RUN_TABLES]
    if not target.exists():
        return names
    known = {file.name: file for file in target.record.files}
    wanted = [name for name in names if name in known] if names[0] in known else names
    return [name for name in wanted if name not in known or list(target.missing_files(target.path, [known[name]]))]


def write_run_tables(
    target: Artefact, source: Artefact, recipe: Recipe, sae: SparseAutoencoder, site: str, progress: Progress
) -> list[str]:
    """Write the missing tables and return their names. The logits need the model, if the recipe has one.

    `source` are the run's tokens.
    """
    names, made, blocks = missing_tables(target), [], ProductBlocks(n_threads(recipe.threads))
    make_folder(target.path)
    if names:
        progress.say("features: which features are alike, and which words they push")
    for name in names:
        table = (
            similar(sae.W_dec, blocks=blocks)
            if name == "similar.parquet"
            else _logits_table(source, recipe, sae, site, blocks)
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
    source: Artefact, recipe: Recipe, sae: SparseAutoencoder, site: str, blocks: ProductBlocks
) -> pa.Table | None:
    if recipe.model is None or not may_run(recipe, recipe.sae.target_site or site):
        return None
    n_vocab = pq.read_metadata(source.own_file("vocab.parquet")).num_rows
    model = load_model(recipe.model)
    target = recipe.sae.target_site or sae.config.target_site or site
    module = site_of_hook(target, [name for name, _ in model.named_modules()]) or target
    return logits(sae.W_dec, model, module, blocks=blocks, n_vocab=n_vocab)
