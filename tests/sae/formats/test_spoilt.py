"""Folders that are no autoencoder, or a damaged one, end in a message that names what was found."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_described
from saeflow.sae.formats.source import describe_source
from tests.support.published_saes import LAYOUTS, draw, gemma_scope, tensors_to, write_json
from tests.support.small_saes import D, F


def open_source(source: Path, **asked: object) -> SparseAutoencoder:
    return load_described(describe_source(SAEConfig.model_validate({"source": str(source)} | asked)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_byte_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def objects(path: Path) -> None:
    """What numpy keeps as a pickle."""
    np.savez(path, W_enc=np.array([object], dtype=object))


def member(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", content)


def header(shape: str, kind: str = "<f4") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def bomb(path: Path) -> None:
    """Honest sizes, but zeros: 100 MB in 100 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_enc.npy", "w") as out:
        out.write(header("(5000, 5000)"))
        for _ in range(25):
            out.write(bytes(4_000_000))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"params\.npz is damaged, it is no \.npz file"),
    "one byte changed": (one_byte_changed, r"params\.npz (is damaged|holds)"),
    "objects": (objects, r"holds object, not real numbers"),
    "whole numbers": (lambda path: np.savez(path, W_enc=np.ones((4, 4), int)), r"holds int64, not real numbers"),
    "a shape larger than the file": (lambda path: member(path, header("(9999, 9999)")), r"claims 9999 × 9999"),
    "a negative shape": (lambda path: member(path, header("(-4, 4)")), r"is damaged"),
    "code for a shape": (lambda path: member(path, header("(__import__('os'),)")), r"is damaged"),
    "a bomb": (bomb, r"would grow to 100,000,\d+ bytes"),
    "another archive": (lambda path: member(path, b"hello"), r"is damaged"),
    "no archive": (lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n"), r"is damaged"),
    "one matrix": (lambda path: np.savez(path, W_enc=np.ones((4, 4))), r"reads matrices W_enc and W_dec .*W_enc 4 × 4"),
    "NaN": (
        lambda path: np.savez(path, **{n: np.full(t.shape, np.nan) for n, t in draw().items() if n != "skip"}),
        r"holds NaN",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_npz_is_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    made = gemma_scope(tmp_path)
    SPOILT[name][0](made.source / "params.npz")
    with pytest.raises(UserError, match=SPOILT[name][1]) as refused:
        open_source(made.source)
    assert len(str(refused.value)) < 2000


def expanded(path: Path) -> None:
    torch.save({"W_enc": torch.zeros(1).expand(100_000, 100_000), "W_dec": torch.zeros(1)}, path)


def test_a_torch_file_that_would_inflate_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    made = LAYOUTS["Qwen-Scope"](tmp_path)
    bomb(made.source)
    with pytest.raises(UserError, match=r"would grow to 100,000,\d+ bytes"):
        open_source(made.source)


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8", "longdouble"])
def test_an_npz_of_any_real_numbers_opens(kind: str, tmp_path: Path) -> None:
    made = gemma_scope(tmp_path)
    with np.load(made.source / "params.npz") as found:
        arrays = {name: np.asfortranarray(found[name].astype(kind)) for name in found.files}
    np.savez(made.source / "params.npz", **arrays)
    weights = open_source(made.source).W_dec.detach().numpy()
    np.testing.assert_array_equal(weights, arrays["W_dec"].astype(np.float32))


def test_a_torch_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    made = LAYOUTS["Qwen-Scope"](tmp_path)
    expanded(made.source)
    with pytest.raises(UserError, match=r"W_enc claims 100000 × 100000, more than the file holds"):
        open_source(made.source)


def test_matrices_that_could_be_meant_either_way_are_not_guessed(tmp_path: Path) -> None:
    p = draw()
    path = tensors_to(tmp_path / "L0_5.pt", {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    with pytest.raises(UserError, match=rf"reads W_enc \(features × width\) .* it holds .*W_enc {D} × {F}"):
        open_source(path)


ODD = [None, True, -1, 0, 1.5, 1e400, float("nan"), 2**63, 10**400, "x", [], {}, [1], {"a": 1}, "../../etc/passwd"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_damage_opens_or_ends_in_one_message(name: str, tmp_path: Path) -> None:
    """A setting changed or lost, bytes changed, a file cut: whatever it is, nothing but UserError leaves."""
    dice = random.Random(name)
    made = LAYOUTS[name](tmp_path)
    files = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    messages = []
    for _ in range(12):
        path, content = dice.choice(list(files.items()))
        about = json.loads(content) if path.suffix == ".json" else {}
        damaged = bytearray(content)
        if about and dice.random() < 0.7:
            about[dice.choice(list(about))] = dice.choice(ODD)
            damaged = bytearray(json.dumps(about).encode())
        elif dice.random() < 0.4:
            del damaged[dice.randrange(len(damaged)) :]
        else:
            for _ in range(4):
                damaged[dice.randrange(min(len(damaged), 2000))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            open_source(made.source, **made.asked)
        except UserError as refused:
            messages.append(str(refused))
        path.write_bytes(content)
    assert len(messages) > 3
    assert max(map(len, messages)) < 3000
    open_source(made.source, **made.asked)


def change(path: Path, **settings: object) -> None:
    write_json(path, json.loads(path.read_text()) | settings)


def test_settings_that_are_not_followed_are_named(tmp_path: Path) -> None:
    made = LAYOUTS["sparsify"](tmp_path / "sparsify")
    change(made.source / "cfg.json", activation="groupmax")
    with pytest.raises(UserError, match=r'activation is "groupmax"; saeflow reads "topk"'):
        open_source(made.source)
    change(made.source / "cfg.json", activation="topk", k=F + 1)
    with pytest.raises(UserError, match=rf"k is {F + 1}, more than its {F} features"):
        open_source(made.source)
    made = LAYOUTS["Llama Scope"](tmp_path / "llama")
    change(made.source / "hyperparams.json", sae_type="crosscoder")
    with pytest.raises(UserError, match=r'sae_type is "crosscoder"; saeflow reads "sae"'):
        open_source(made.source)
    change(made.source / "hyperparams.json", sae_type="sae", dataset_average_activation_norm=None)
    with pytest.raises(UserError, match=r"dataset_average_activation_norm is nowhere"):
        open_source(made.source)
    open_source(made.source, input_scale=0.75)
    made = LAYOUTS["Gemma Scope 2"](tmp_path / "gemma")
    tensors = {name.lower(): tensor for name, tensor in draw().items() if name != "skip"}
    tensors_to(made.source / "params.safetensors", tensors | {"w_dec": torch.zeros(F, 3, D)})
    with pytest.raises(UserError, match=rf"matrices W_enc and W_dec of one site; it holds .*W_dec {F} × 3 × {D}"):
        open_source(made.source)


def test_a_factor_that_a_folder_lacks_comes_from_the_recipe(tmp_path: Path) -> None:
    made = LAYOUTS["SAELens expected_average_only_in"](tmp_path)
    (made.source / "activation_scaler.json").unlink()
    with pytest.raises(UserError, match=r"expected_average_only_in, but the folder does not hold the factor.\nSet"):
        open_source(made.source)
    open_source(made.source, input_scale=0.7)
    twice = LAYOUTS["SAELens constant_scalar_rescale"](tmp_path / "twice")
    with pytest.raises(UserError, match=r"sae\.input_scale is 2.0, but .* already names a factor: 1.7"):
        open_source(twice.source, input_scale=2.0)


def test_a_file_of_qwen_scope_away_from_its_repository_asks_for_k(tmp_path: Path) -> None:
    made = LAYOUTS["Qwen-Scope"](tmp_path)
    moved = made.source.rename(tmp_path / "layer0.sae.pt")
    with pytest.raises(UserError, match=r"does not say how many features a token keeps.*\nSet sae\.k"):
        open_source(moved)
    open_source(moved, k=5)
    with pytest.raises(UserError, match=r"sae\.k"):
        open_source(tmp_path)


def test_a_folder_of_several_asks_for_one(tmp_path: Path) -> None:
    LAYOUTS["sparsify"](tmp_path / "many")
    with pytest.raises(UserError, match=r"autoencoders in the folders layers\.0\.mlp: name one of them, such as .*mlp"):
        open_source(tmp_path / "many")
    path = LAYOUTS["Qwen-Scope"](tmp_path / "qwen").source
    (path.parent / "layer1.sae.pt").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 autoencoders: layer0\.sae\.pt, layer1\.sae\.pt\.\nName one of them"):
        open_source(path.parent)


def test_an_unknown_folder_ends_with_what_was_found_and_what_is_understood(tmp_path: Path) -> None:
    save_file({"enc": torch.zeros(3, 4), "scale": torch.zeros(())}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "broken.npz").write_text("none")
    with pytest.raises(UserError) as refused:
        open_source(tmp_path)
    said = str(refused.value)
    for program in ("SAELens", "dictionary_learning", "sparsify", "Gemma Scope", "Qwen-Scope", "Llama Scope"):
        assert program in said
    assert "Found: broken.npz (unreadable); notes.txt; weights.safetensors (enc 3 × 4, scale one number)." in said
