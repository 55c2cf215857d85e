"""We open what sparsify and dictionary_learning wrote and agree on every value: they run in their own environment.

Values agree within 1e-5 × (|x| · |w| + |b|) before saeflow's rounding to 11 bits; where a pre-activation is nearer than
that to its threshold, or to the k-th largest, either may be right.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeflow.recipe.settings import SAEConfig
from saeflow.sae.formats.load import load_described
from saeflow.sae.formats.source import describe_source
from tests.benchmarks._peers import OFFLINE, PEER
from tests.support.small_saes import D, F, K, rows, values_of

DICTIONARIES = PEER.parents[2] / "dictionary_learning"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PEER.exists(), reason="sparsify is not installed: make peers"),
    pytest.mark.skipif(not DICTIONARIES.exists(), reason="dictionary_learning is not installed: make peers"),
]

SIZES = {"activation_dim": D, "dict_size": F}
SPARSE = {"num_latents": F, "k": K}
THEIRS: dict[str, dict[str, Any]] = {
    "sparsify": {"class": "SparseCoder", "settings": SPARSE},
    "sparsify with a skip connection": {"class": "SparseCoder", "settings": SPARSE | {"skip_connection": True}},
    "sparsify transcoder": {"class": "SparseCoder", "settings": SPARSE | {"transcode": True}},
    "sparsify skip transcoder": {
        "class": "SparseCoder", "settings": SPARSE | {"transcode": True, "skip_connection": True},
    },
    "AutoEncoder": {"class": "AutoEncoder", "settings": SIZES},
    "AutoEncoderNew": {"class": "AutoEncoderNew", "settings": SIZES},
    "GatedAutoEncoder": {"class": "GatedAutoEncoder", "settings": SIZES},
    "JumpReluAutoEncoder": {"class": "JumpReluAutoEncoder", "settings": SIZES},
    "AutoEncoderTopK": {"class": "AutoEncoderTopK", "settings": SIZES | {"k": K}},
    "BatchTopKSAE": {"class": "BatchTopKSAE", "settings": SIZES | {"k": K}},
    "MatryoshkaBatchTopKSAE": {
        "class": "MatryoshkaBatchTopKSAE", "settings": SIZES | {"k": K, "group_sizes": [10, 40, F - 50]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each, with what its program makes of the rows; all in one process, as it starts slowly."""
    folder = tmp_path_factory.mktemp("written")
    np.save(folder / "x.npy", rows().numpy())
    kinds = {str(folder / name): kind | {"seed": seed} for seed, (name, kind) in enumerate(THEIRS.items())}
    about = {"x": str(folder / "x.npy"), "dictionary_learning": str(DICTIONARIES), "folders": kinds}
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ} | OFFLINE
    command = [PEER, "-I", Path(__file__).resolve().parents[2] / "support" / "_other_peers.py"]
    run = subprocess.run(command, input=json.dumps(about), env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", THEIRS)
def test_we_open_what_another_program_saved_and_give_the_same_values(name: str, written: Path) -> None:
    target = {"target_site": "other"} if "transcoder" in name else {}
    sae = load_described(describe_source(SAEConfig.model_validate({"source": str(written / name)} | target)))
    x = rows()
    p = {key: value.detach().double() for key, value in sae.state_dict().items()}
    pre = (x.double() - p.get("centre", p["b_dec"])) @ p["W_enc"].t() + p["b_enc"]
    allowed = 1e-5 * (x.double().norm(dim=1)[:, None] * p["W_enc"].norm(dim=1) + p["b_enc"].abs())
    cut = pre.topk(K, dim=1).values[:, -1:] if sae.config.architecture == "topk" else p["threshold"].expand(F)
    sure = ((pre - cut).abs() > allowed) | (pre == cut)
    if sae.config.architecture == "gated":
        allowed = p["r_mag"].exp() * allowed + 1e-5 * p["b_mag"].abs()
    with np.load(written / name / "values.npz") as found:
        theirs = {key: torch.from_numpy(found[key]).double() for key in found.files}
    ours = values_of(sae, x)
    assert sure.double().mean() > 0.95
    assert ((theirs["values"] - ours).abs() <= allowed + 2.0**-11 * ours.abs())[sure].all()
    assert 0.005 < (ours > 0).double().mean() < 0.8
    same = ((theirs["values"] > 0) == (ours > 0)).all(dim=1)
    torch.testing.assert_close(sae.reconstruct(x).double()[same], theirs["reconstruction"][same], rtol=2e-3, atol=2e-2)
