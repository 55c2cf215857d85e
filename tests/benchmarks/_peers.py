"""Autoencoders of SAELens and sparsify, trained and read in the peers' own environment (`make peers`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEER = Path(__file__).resolve().parents[2] / ".bench" / "saelens" / "bin" / "python"
PROGRAM = Path(__file__).with_name("_peer_train.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
ERROR_LINES = 100


def available() -> bool:
    """Are both peers here? An environment of an older `make peers` lacks sparsify."""
    return PEER.exists() and (PEER.parent / "sparsify").exists()


def train(**about: Any) -> dict[str, Any]:
    """Train as `_peer_train.Training` says and return its figures."""
    return _run(about)


def train_several(trainings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what `train` does several times in one process: the peers take long to import."""
    return _run({"several": trainings})  # type: ignore[return-value]


def train_each(trainings: Sequence[dict[str, Any]], python: Path = PEER) -> list[dict[str, Any]]:
    """Do what `train_several` does with an interpreter; a training that fails has only its `error`."""
    return _run({"each": trainings}, python)  # type: ignore[return-value]


def values_of(folder: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What SAELens makes of rows (n, D) with the autoencoder saved in a folder: values (n, F), reconstruction (n,
    D)."""
    with tempfile.TemporaryDirectory(prefix="saeflow-peers-") as temporary:
        read, written = Path(temporary) / "rows.npy", Path(temporary) / "values.npz"
        np.save(read, rows)
        _run({"values_of": folder, "rows": read, "out": written})
        with np.load(written) as found:
            return found["values"], found["reconstruction"]


def _run(about: dict[str, Any], python: Path = PEER) -> dict[str, Any]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ} | OFFLINE
    # -I: the folder of the program holds modules named like others' (`train`, `compression`)
    command = [python, "-I", PROGRAM]
    asked = json.dumps(about, default=str)
    run = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        tail = "\n".join(run.stderr.splitlines()[-ERROR_LINES:])
        raise RuntimeError(f"The peer ended with {run.returncode}.\n{tail}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
