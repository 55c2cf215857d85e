"""Massive activations are found while collecting, and said with the way out."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from saeflow.activations import norms, shards
from saeflow.activations.norms import massive_positions, mean_norms
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.model.sites import SiteReader
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.progress import Progress
from saeflow.runtime.terminal import Terminal
from saeflow.store.store import Store
from saeflow.store.verify import verify
from tests.support.small_pipeline import CONTEXT_LENGTH, SITE, recipe_data


@pytest.fixture
def said() -> Progress:
    return Progress(Terminal(file=io.StringIO(), width=200))


def text(progress: Progress) -> str:
    return progress.console.file.getvalue()


@pytest.fixture
def huge_first(monkeypatch) -> None:
    """Position 0 of every sequence is a thousand times as long as the model makes it."""
    real = SiteReader.read

    def read(self, vocab_ids, mask):
        found = real(self, vocab_ids, mask)
        found[SITE][:, 0] *= 1000
        return found

    monkeypatch.setattr(SiteReader, "read", read)


def collected(folder, ingredients, progress, **changes):
    recipe = parse_recipe(recipe_data(ingredients, **changes))
    where = Store.create(folder)
    tokens.run(Lineage(where, recipe), progress)
    return where, recipe, collect.run(Lineage(where, recipe), progress)


def test_the_norms_kept_are_those_of_the_stored_vectors(finished):
    artefact = Lineage(finished.store, finished.recipe).activations
    source = Lineage(finished.store, finished.recipe).tokens
    (site,) = stored_sites(artefact)
    for part, read in zip(artefact.published().parts, source.published().parts, strict=True):
        length = shards.open_site(artefact, part, site).read(slice(None)).double().norm(dim=2).numpy()
        mask = token_parts.read_part(source, read)[1]
        table = pq.read_table(artefact.part_path(part) / norms.NORMS_FILE)
        assert table.column_names == ["site", "position", "n_tokens", "sum_norm", "max_norm"]
        assert set(table.column("site").to_pylist()) == {SITE}
        assert table.column("position").to_pylist() == list(range(CONTEXT_LENGTH))
        assert table.column("n_tokens").to_pylist() == mask.sum(0).tolist()
        np.testing.assert_allclose(table.column("sum_norm"), (length * mask).sum(0), rtol=1e-3)
        np.testing.assert_allclose(table.column("max_norm"), (length * mask).max(0), rtol=1e-3)


def test_a_massive_position_is_named_with_the_setting_that_leaves_it_out(tmp_path, ingredients, said, huge_first):
    collected(tmp_path / "store", ingredients, said)
    assert f"at {SITE}, vectors at position 0 are massive: mean norm" in text(said)
    assert "Set activations.skip_positions = [0]; nothing is collected again" in text(said)


def test_a_position_that_is_left_out_already_is_not_named(tmp_path, ingredients, said, huge_first):
    changes = {"activations": {"skip_positions": [0]}}
    _, recipe, artefact = collected(tmp_path / "store", ingredients, said, **changes)
    assert "massive" not in text(said)
    assert massive_positions(mean_norms(artefact)[SITE]) == [0]
    assert recipe.activations.skip_positions == [0]


def test_an_ordinary_model_gets_no_warning(tmp_path, ingredients, said):
    collected(tmp_path / "store", ingredients, said)
    assert "massive" not in text(said)


def test_parts_without_norms_are_valid_and_say_nothing(tmp_path, ingredients, said, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(norms.Norms, "write", lambda self, path: None)
        where, recipe, artefact = collected(tmp_path / "store", ingredients, said)
    assert mean_norms(artefact) == {}
    assert list(verify(where, full=True)) == []
    shutil.rmtree(artefact.part_path(artefact.published().parts[0]))
    collect.run(Lineage(where, recipe), said)
    assert mean_norms(artefact)[SITE].shape == (CONTEXT_LENGTH,)


@pytest.mark.parametrize(
    ("means", "positions"),
    [
        ([1, 1, 1, 1], []),
        ([11, 1, 1, 1], [0]),
        ([10, 1, 1, 1], []),
        ([24_000, 150, 140, 160, 1700], [0, 4]),
        ([np.nan, np.nan], []),
        ([50, 1, np.nan, 1, 1], [0]),
        ([0, 0, 0], []),
        ([3], []),
    ],
)
def test_a_position_is_massive_above_ten_times_the_median_position(means, positions):
    assert massive_positions(np.array(means, float)) == positions
