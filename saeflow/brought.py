"""Activations that no model gives: the user's own tables, and made ones with known structure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import torch

from saeflow.config import SyntheticConfig, UserError

_TOY_STEPS = 3000


@dataclass(frozen=True)
class Table:
    """Rows of activations: `values` float32 (N, D), a label a row, and the known directions, if any, (n, D)."""

    labels: list[str]
    values: np.ndarray
    directions: np.ndarray | None = None


def read_table(path: str) -> Table:
    """Read a CSV, TSV, Parquet or npy file: numeric columns are neurons, the first text column labels rows.

    Raises UserError for a file that is missing, cannot be read or is not numeric.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"activations.source: no file at {path}.")
    match file.suffix.lower():
        case ".npy":
            table = _from_array(file)
        case ".csv" | ".tsv" | ".parquet":
            table = _from_columns(file)
        case other:
            raise UserError(
                f"activations.source is {file.name}, but {other or 'no ending'} is none of .csv .tsv .parquet .npy."
            )
    if table.values.ndim != 2 or 0 in table.values.shape:
        raise UserError(
            f"activations.source: {file.name} has shape {table.values.shape}; a table of rows × neurons is needed."
        )
    return table


def _from_array(file: Path) -> Table:
    try:
        return _unlabelled(np.load(file, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise UserError(f"activations.source: {file.name} is no array of numbers in npy format.") from error


def _unlabelled(values: np.ndarray) -> Table:
    return Table(_names(len(values)), values.astype(np.float32))


def _names(n: int) -> list[str]:
    return [f"row {i}" for i in range(n)]


def _from_columns(file: Path) -> Table:
    connection = duckdb.connect()
    try:
        read = connection.from_parquet if file.suffix == ".parquet" else connection.read_csv
        data: pa.Table = read(str(file)).to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"activations.source: {file.name} cannot be read: {str(error).splitlines()[0]}") from error
    names = [
        f.name
        for f in data.schema
        if pa.types.is_floating(f.type) or pa.types.is_integer(f.type) or pa.types.is_decimal(f.type)
    ]
    texts = [f.name for f in data.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if not names:
        raise UserError(
            f"activations.source: {file.name} has no numeric column; it has {', '.join(data.schema.names)}."
        )
    values = np.column_stack([data.column(name).cast(pa.float64()).to_numpy() for name in names]).astype(np.float32)
    labels = [str(label) for label in data.column(texts[0]).to_pylist()] if texts else _unlabelled(values).labels
    return Table(labels, values)


def make_table(config: SyntheticConfig) -> Table:
    """Made activations whose true directions are known."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.kind == "sparse":
        return _sparse_mixture(config, generator)
    return _superposition(config, generator)


def _sparse_mixture(config: SyntheticConfig, generator: torch.Generator) -> Table:
    """Rows are sums of one to `n_active` of `n_true` random unit directions, strengths uniform in [0, 1]."""
    directions = torch.nn.functional.normalize(torch.randn(config.n_true, config.n_neurons, generator=generator), dim=1)
    order = torch.rand(config.n_samples, config.n_true, generator=generator).argsort(1)[:, : config.n_active]
    strengths = torch.rand(config.n_samples, config.n_active, generator=generator)
    n_present = torch.randint(1, config.n_active + 1, (config.n_samples, 1), generator=generator)
    strengths *= torch.arange(config.n_active) < n_present
    values = (directions[order] * strengths[:, :, None]).sum(1)
    return Table(_names(len(values)), values.numpy(), directions.numpy())


def _superposition(config: SyntheticConfig, generator: torch.Generator) -> Table:
    """The hidden layer of a toy model of superposition, `relu(W'Wx + b)` trained to copy sparse x; x = 0 is left out.

    Elhage et al. 2022 (transformer-circuits.pub/2022/toy_model). Directions are the columns of W (m, n).
    """
    n, m = config.n_true, config.n_neurons
    weight = torch.nn.Parameter(torch.randn(m, n, generator=generator) * 0.5)
    bias = torch.nn.Parameter(torch.zeros(n))
    adam = torch.optim.Adam([weight, bias], lr=1e-2)
    for step in range(_TOY_STEPS):
        adam.param_groups[0]["lr"] = 1e-2 * min(1.0, 2 - 2 * step / _TOY_STEPS)
        x = _sparse_inputs(512, n, config.density, generator)
        loss = (torch.relu(x @ weight.T @ weight + bias) - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    x = _sparse_inputs(config.n_samples, n, config.density, generator)
    hidden = (x[x.sum(1) > 0] @ weight.detach().T).numpy()
    return Table(_names(len(hidden)), hidden, weight.detach().T.numpy())


def _sparse_inputs(n_rows: int, n: int, density: float, generator: torch.Generator) -> torch.Tensor:
    present = torch.rand(n_rows, n, generator=generator) < density
    return torch.rand(n_rows, n, generator=generator) * present
