"""The map of decoder directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from saeflow.browser.directions import pca_places
from tests.browser.test_server import run_of


def test_the_map_has_a_point_for_each_feature_and_the_picture_at_most_n(pages: TestClient) -> None:
    here = f"/runs/{run_of(pages)}"
    summary = pages.get(f"{here}/ask/feature_summary.json").json()["panels"]["rows"]["rows"]
    points = pages.get(f"{here}/map.json").json()["points"]
    assert [point["feature_id"] for point in points] == [row["feature_id"] for row in summary]
    assert [point["density"] for point in points] == [row["density"] for row in summary]
    assert 1 <= len(pages.get(f"{here}/map.json?n=5").json()["points"]) <= 5


def test_the_page_says_that_distances_mislead(pages: TestClient) -> None:
    assert "Distances on this map mislead" in pages.get(f"/runs/{run_of(pages)}/map").text


@pytest.mark.parametrize("wrong", ["by=tsne", "n=-1", "n=x"])
def test_a_map_that_cannot_be_drawn_is_refused(pages: TestClient, wrong: str) -> None:
    assert pages.get(f"/runs/{run_of(pages)}/map.json?{wrong}").status_code == 404


def test_places_are_those_of_a_principal_component_analysis(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 16)) * np.linspace(3, 0.5, 16)
    save_file({"W_dec": rows.astype(np.float32)}, tmp_path / "sae.safetensors")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    wanted = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    found = pca_places(tmp_path / "sae.safetensors")
    assert np.allclose(np.abs(found), np.abs(wanted), atol=2e-3)
    assert np.array_equal(found, pca_places(tmp_path / "sae.safetensors"))


def test_umap_lays_the_map_out_if_it_is_installed(
    pages: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "umap.py").write_text(
        "class UMAP:\n"
        "    def __init__(self, **settings): pass\n"
        "    def fit_transform(self, rows): return rows[:, :2] * 0 + 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    here = f"/runs/{run_of(pages)}/map"
    assert "?by=umap" in pages.get(here).text
    assert {(point["x"], point["y"]) for point in pages.get(f"{here}.json?by=umap").json()["points"]} == {(7, 7)}
