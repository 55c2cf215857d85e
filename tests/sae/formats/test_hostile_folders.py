"""A folder of an autoencoder from a stranger runs nothing, hangs nothing, and ends in one message."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saeflow.runtime.errors import UserError
from saeflow.sae.formats.load import load_sae
from tests.support.sae_folders import write_saelens

TENSORS = {"W_enc": torch.ones(4, 8), "W_dec": torch.ones(8, 4), "b_enc": torch.zeros(8), "b_dec": torch.zeros(4)}


FULL = {"activation_fn": "relu", "normalize_activations": "none", "apply_b_dec_to_input": True}


class Touches:
    """What a pickle may name: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def header(folder: Path, about: object, n_bytes: int | None = None) -> None:
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    length = struct.pack("<Q", len(text) if n_bytes is None else n_bytes)
    (folder / "sae_weights.safetensors").write_bytes(length + text + bytes(64))


def tensor(shape: list[int], span: list[int], kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": span}


def settings(folder: Path, **changed: object) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def pickled(folder: Path, mark: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    about = {"dict_class": "AutoEncoder", "activation_dim": 4, "dict_size": 8}
    (folder / "config.json").write_text(json.dumps({"trainer": about}))
    torch.save({"encoder.weight": Touches(mark)}, folder / "ae.pt", _use_new_zipfile_serialization=False)


def torch_saved(folder: Path, mark: Path) -> None:
    pickled(folder, mark)
    torch.save({"encoder.weight": Touches(mark)}, folder / "ae.pt")


def pickle_as_weights(folder: Path, mark: Path) -> None:
    torch.save(Touches(mark), folder / "sae_weights.safetensors", _use_new_zipfile_serialization=False)


def broken_link(folder: Path, mark: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.safetensors").symlink_to(mark)


def one_of_another_shape(folder: Path, mark: Path) -> None:
    save_file(TENSORS | {"W_enc": torch.ones(8, 4)}, folder / "sae_weights.safetensors")


HUGE = 2**31 - 1
HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    "header longer than the file": lambda f, _: header(f, {}, 1 << 40),
    "header of no bytes": lambda f, _: header(f, b""),
    "header nested deeply": lambda f, _: header(f, b"[" * 100_000),
    "a shape larger than the file": lambda f, _: header(f, {"W_enc": tensor([HUGE, HUGE], [0, 64])}),
    "a shape that overflows": lambda f, _: header(f, {"W_enc": tensor([2**63, 2], [0, 64])}),
    "negative offsets": lambda f, _: header(f, {"W_enc": tensor([4, 4], [-64, 0])}),
    "offsets that overlap": lambda f, _: header(f, {n: tensor([4, 4], [0, 64]) for n in ("W_enc", "W_dec")}),
    "an unknown type": lambda f, _: header(f, {"W_enc": tensor([4, 4], [0, 64], "OBJECT")}),
    "an empty file": lambda f, _: (f / "sae_weights.safetensors").write_bytes(b""),
    "another shape": one_of_another_shape,
    "more features than there are": lambda f, _: settings(f, d_sae=HUGE, d_in=HUGE),
    "a number beyond all": lambda f, _: settings(f, d_sae=10**400),
    "not a number": lambda f, _: settings(f, d_in=float("nan")),
    "a class in place of a name": lambda f, _: settings(f, architecture="os.system"),
    "a list in place of a name": lambda f, _: settings(f, architecture=["topk"]),
    "settings nested deeply": lambda f, _: (f / "cfg.json").write_text('{"a":' * 100_000),
    "settings that are a list": lambda f, _: (f / "cfg.json").write_text("[]"),
    "settings that are no text": lambda f, _: (f / "cfg.json").write_bytes(b"\xff\xfe\x00"),
    "a pickle named as weights": pickle_as_weights,
    "a pickle": pickled,
    "a pickle as torch saves it": torch_saved,
    "a link to nothing": broken_link,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_autoencoder_runs_nothing_and_ends_in_one_message(name, tmp_path):
    folder, mark = write_saelens(tmp_path / "sae", "standard", TENSORS, **FULL), tmp_path / "ran"
    assert load_sae(folder).config.n_features == 8
    HOSTILE[name](folder, mark)
    with pytest.raises(UserError) as ended:
        load_sae(folder)
    assert len(str(ended.value)) < 2_000
    assert not mark.exists()


def test_hooks_and_code_named_in_the_settings_are_only_text(tmp_path):
    folder = write_saelens(tmp_path / "sae", "standard", TENSORS, **FULL)
    settings(folder, metadata={"hook_name": "__import__('os').system('touch ran')", "auto_map": {"AutoModel": "x.py"}})
    (folder / "x.py").write_text("raise SystemExit")
    assert load_sae(folder).config.n_features == 8


def test_twenty_and_more_folders_are_tried():
    assert len(HOSTILE) >= 20
