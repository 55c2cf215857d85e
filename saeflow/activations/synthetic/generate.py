"""Made activations of any kind, as rows to store or as a table in memory."""

from __future__ import annotations

import numpy as np

from saeflow.activations.synthetic import superposition, toy_models
from saeflow.activations.tables.row_labels import row_name
from saeflow.activations.tables.stream import InMemoryTable, TableReader, TableRows
from saeflow.recipe.synthetic import SyntheticConfig


def make_table(config: SyntheticConfig) -> InMemoryTable:
    """Make a small table in memory, with the true directions of its features."""
    if config.kind == "superposed":
        found = list(TableReader(superposition.superposed_rows(config)).read(0, config.n_samples))
        labels = [label for _, each in found for label in each or ()]
        directions = superposition.SuperposedFeatures.of(config).directions
        return InMemoryTable(labels, np.concatenate([values for values, _ in found]), directions)
    values, directions = toy_models.toy_rows(config)
    return InMemoryTable([row_name(row) for row in range(len(values))], values, directions)


def made_rows(config: SyntheticConfig) -> TableRows:
    """Make the rows to store, block by block."""
    return superposition.superposed_rows(config) if config.kind == "superposed" else make_table(config).rows()
