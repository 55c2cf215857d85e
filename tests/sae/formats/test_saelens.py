"""SAELens and saeflow read each other's folders and agree on every value: SAELens runs in its own environment.

Values agree within 1e-5 × (|x| · |w| + |b|) before saeflow's rounding to 11 bits; where a pre-activation is nearer than
that to its threshold, or to the k-th largest, either may be right.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.save import save_sae
from tests.benchmarks._peers import OFFLINE, PEER
from tests.support.small_saes import D_OUT, EVERY, D, F, K, obvious_values, rows, trained, values_of

pytestmark = pytest.mark.skipif(not PEER.exists(), reason="SAELens is not installed: make peers")

OURS: dict[str, SparseAutoencoder] = {
    f"{name}{'-transcoder' if settings else ''}": trained(name, **settings)
    for name in EVERY
    for settings in ({}, {"target_site": "other"})
}
SIZES = {"d_in": D, "d_sae": F}
TRANSCODES = SIZES | {"d_out": D_OUT, "apply_b_dec_to_input": False}
BY_NORM = {"rescale_acts_by_decoder_norm": True}
OFF = {"apply_b_dec_to_input": False}
THEIRS: dict[str, dict[str, Any]] = {
    "standard": {"class": "StandardSAE", "settings": SIZES},
    "standard-off": {"class": "StandardSAE", "settings": SIZES | OFF},
    "topk": {"class": "TopKSAE", "settings": SIZES | {"k": K}},
    "topk-by-norm": {"class": "TopKSAE", "settings": SIZES | {"k": K} | BY_NORM},
    "topk-by-norm-off": {"class": "TopKSAE", "settings": SIZES | {"k": K} | BY_NORM | OFF},
    "abstopk": {"class": "AbsTopKSAE", "settings": SIZES | {"k": K}},
    "abstopk-by-norm": {"class": "AbsTopKSAE", "settings": SIZES | {"k": K} | BY_NORM},
    "jumprelu": {"class": "JumpReLUSAE", "settings": SIZES},
    "jumprelu-off": {"class": "JumpReLUSAE", "settings": SIZES | OFF},
    "gated": {"class": "GatedSAE", "settings": SIZES},
    "gated-off": {"class": "GatedSAE", "settings": SIZES | OFF},
    "transcoder": {"class": "Transcoder", "settings": TRANSCODES},
    "jumprelu-transcoder": {"class": "JumpReLUTranscoder", "settings": TRANSCODES},
    "training-standard": {"class": "StandardTrainingSAE", "settings": SIZES},
    "training-gated": {"class": "GatedTrainingSAE", "settings": SIZES | OFF},
    "training-topk": {"class": "TopKTrainingSAE", "settings": SIZES | {"k": K}},
    "training-jumprelu": {"class": "JumpReLUTrainingSAE", "settings": SIZES},
    "training-batchtopk": {"class": "BatchTopKTrainingSAE", "settings": SIZES | {"k": 4.5}},
    "training-batchtopk-plain": {
        "class": "BatchTopKTrainingSAE",
        "settings": SIZES | OFF | {"k": K, "rescale_acts_by_decoder_norm": False},
    },
    "training-matryoshka": {
        "class": "MatryoshkaBatchTopKTrainingSAE",
        "settings": SIZES | {"k": K, "matryoshka_widths": [10, 50, F]},
    },
}
UNLIKE: dict[str, dict[str, Any]] = {
    "constant-norm": {
        "class": "TopKSAE",
        "settings": SIZES | {"k": K, "normalize_activations": "constant_norm_rescale"},
    },
    "layer-norm": {"class": "StandardSAE", "settings": SIZES | {"normalize_activations": "layer_norm"}},
    "layer-norm-off": {"class": "JumpReLUSAE", "settings": SIZES | OFF | {"normalize_activations": "layer_norm"}},
    "skip-transcoder": {"class": "SkipTranscoder", "settings": TRANSCODES},
    "jumprelu-skip-transcoder": {"class": "JumpReLUSkipTranscoder", "settings": TRANSCODES},
}
"""Autoencoders that normalise each vector, or add a map of it to the reconstruction."""
SAELENS_HAS_NO = {
    "topk-transcoder": "topk_transcoder", "gated-transcoder": "gated_transcoder",
    "abstopk-transcoder": "abstopk_transcoder",
}  # fmt: skip


def of_ours(name: str) -> SparseAutoencoder:
    """One of ours that normalises, or skips, as one of theirs does."""
    skips = "skip" in name
    architecture = {"Stand": "relu", "TopKS": "topk", "SkipT": "relu"}.get(UNLIKE[name]["class"][:5], "jumprelu-l0")
    sae = trained(architecture, **({"target_site": "other"} if skips else {}))
    if skips:
        sae.W_skip = torch.randn(D_OUT, D, generator=torch.Generator().manual_seed(9)) / 3
        sae.centre.zero_()
    sae.input_norm = UNLIKE[name]["settings"].get("normalize_activations", "none")
    return sae


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder an SAE, ours and theirs, with what SAELens makes of the rows; all in one run of it, as it starts
    slowly."""
    folder = tmp_path_factory.mktemp("exchanged")
    folders: dict[str, Any] = {}
    for name, sae in OURS.items():
        save_sae(sae, folder / "ours" / name, {"hook_name": "blocks.3"})
        folders[str(folder / "ours" / name)] = None
    for name in UNLIKE:
        save_sae(of_ours(name), folder / "ours" / name, {"hook_name": "blocks.3"})
        folders[str(folder / "ours" / name)] = None
    for seed, (name, kind) in enumerate((THEIRS | UNLIKE).items()):
        folders[str(folder / "theirs" / name)] = kind | {"seed": seed}
    np.save(folder / "x.npy", rows().numpy())
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ} | OFFLINE
    about = json.dumps({"x": str(folder / "x.npy"), "folders": folders})
    command = [PEER, "-I", Path(__file__).resolve().parents[2] / "support" / "_saelens.py"]
    run = subprocess.run(command, input=about, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def found_by_saelens(folder: Path) -> Mapping[str, Tensor]:
    with np.load(folder / "values.npz") as found:
        return {name: torch.from_numpy(found[name]).double() for name in found.files}


def assert_agrees(sae: SparseAutoencoder, x: Tensor, theirs: Mapping[str, Tensor]) -> None:
    p = {name: value.detach().double() for name, value in (*sae.named_parameters(), *sae.named_buffers())}
    b_in = p.get("centre", p["b_dec"])
    pre = (x.double() - b_in) @ p["W_enc"].t() + p["b_enc"]
    allowed = 1e-5 * (x.double().norm(dim=1)[:, None] * p["W_enc"].norm(dim=1) + p["b_enc"].abs())
    size = pre.abs() if sae.config.architecture == "abstopk" else pre
    cut = p["threshold"].expand(F)
    if sae.config.architecture in ("topk", "abstopk"):
        cut = size.topk(K, dim=1).values[:, -1:]
    sure = (size - cut).abs() > allowed
    assert sure.double().mean() > 0.95
    wanted, given = obvious_values(sae, x), theirs["values"]
    if sae.config.architecture == "gated":
        allowed = p["r_mag"].exp() * allowed + 1e-5 * p["b_mag"].abs()
    assert ((given - wanted).abs() <= allowed)[sure | (size == cut)].all()
    ours = values_of(sae, x)
    assert ((given - ours).abs() <= allowed + 2.0**-11 * wanted.abs())[sure].all()
    assert 0.005 < (given > 0).double().mean() < 0.8
    again = given @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(again, theirs["reconstruction"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(OURS.keys() - SAELENS_HAS_NO.keys()))
def test_saelens_loads_ours_and_gives_the_same_values(name: str, exchanged: Path) -> None:
    assert_agrees(OURS[name], rows(), found_by_saelens(exchanged / "ours" / name))


@pytest.mark.parametrize(("name", "architecture"), SAELENS_HAS_NO.items())
def test_saelens_refuses_by_name_what_it_has_not(name: str, architecture: str, exchanged: Path) -> None:
    assert architecture in (exchanged / "ours" / name / "refused.txt").read_text("utf-8")


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_what_saelens_saved_and_give_the_same_values(name: str, exchanged: Path) -> None:
    folder = exchanged / "theirs" / name
    for saved in (folder, folder / "inference") if (folder / "inference").is_dir() else (folder,):
        assert_agrees(load_sae(saved), rows(), found_by_saelens(folder))


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_normalised_vectors_and_skip_connections_are_the_same_on_both_sides(
    name: str, side: str, exchanged: Path
) -> None:
    folder, x = exchanged / side / name, rows()
    sae = of_ours(name) if side == "ours" else load_sae(folder)
    assert_same(sae, x, found_by_saelens(folder))
    assert_same(load_sae(folder), x, found_by_saelens(folder))


def assert_same(sae: SparseAutoencoder, x: Tensor, theirs: Mapping[str, Tensor]) -> None:
    """Values within 1e-5 × the largest before rounding to 11 bits, except where a threshold lies between both."""
    ours = values_of(sae, x)
    same = (theirs["values"] > 0) == (ours > 0)
    assert same.double().mean() > 0.999
    assert 0.005 < (ours > 0).double().mean() < 0.8
    assert ((theirs["values"] - ours).abs() <= 1e-5 * ours.max() + 2.0**-11 * ours)[same].all()
    rows_alike = same.all(dim=1)
    scale = theirs["reconstruction"].abs().max().item()
    torch.testing.assert_close(
        sae.reconstruct(x).double()[rows_alike], theirs["reconstruction"][rows_alike], rtol=1e-3, atol=1e-3 * scale
    )
