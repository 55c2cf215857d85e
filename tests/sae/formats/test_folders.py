"""Folders of autoencoders: ours back to the bit, and those of other programs against their formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.runtime.errors import UserError
from saeflow.sae.autoencoder import SparseAutoencoder
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.save import save_sae
from tests.support.sae_folders import write_saelens
from tests.support.small_saes import D_OUT, EVERY, B, D, F, K, obvious_values, rows, trained, values_of

FILES = ("cfg.json", "sae_weights.safetensors")


def assert_values(sae: SparseAutoencoder, x: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    """Equal to the formula within 11 significand bits and what float32 weights and biases allow."""
    got = values_of(sae, x)
    near = 1e-6 * wanted.abs().max() * scale
    sure = (wanted.abs() - near > 0) | (wanted.abs() + near <= 0)
    assert torch.equal(got.sign()[sure], wanted.sign()[sure])
    assert ((got - wanted).abs() <= 2.0**-11 * wanted.abs() + near).all()
    assert 0.001 < (wanted != 0).double().mean() < 0.9


@pytest.mark.parametrize("name", EVERY)
def test_an_autoencoder_comes_back_to_the_bit_and_is_saved_alike(name: str, tmp_path: Path) -> None:
    sae, x = trained(name), rows()
    save_sae(sae, tmp_path / "one", {"site": "layers.3"})
    loaded = load_sae(tmp_path / "one")
    assert loaded.config == sae.config
    assert torch.equal(loaded.threshold, sae.threshold)
    assert torch.equal(values_of(loaded, x), values_of(sae, x))
    assert torch.equal(loaded.reconstruct(x), sae.reconstruct(x))
    save_sae(loaded, tmp_path / "two", {"site": "layers.3"})
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", EVERY)
def test_a_transcoder_comes_back_with_its_centre_in_the_biases(name: str, tmp_path: Path) -> None:
    sae, x = trained(name, target_site="other"), rows()
    save_sae(sae, tmp_path / "one", {})
    loaded = load_sae(tmp_path / "one")
    assert loaded.config == sae.config
    assert loaded.W_dec.shape == (F, D_OUT)
    assert not loaded.centre.any()
    assert_values(loaded, x, obvious_values(sae, x))
    torch.testing.assert_close(loaded.reconstruct(x), sae.reconstruct(x), rtol=1e-3, atol=1e-3)
    save_sae(loaded, tmp_path / "two", {})
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


THEIRS = {
    "relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "matryoshka": "jumprelu", "gated": "gated",
    "jumprelu-l0": "jumprelu", "jumprelu-tanh": "jumprelu", "abstopk": "abstopk",
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("transcodes", [False, True])
def test_the_folder_has_the_layout_of_saelens(name: str, transcodes: bool, tmp_path: Path) -> None:
    save_sae(trained(name, **({"target_site": "other"} if transcodes else {})), tmp_path, {"site": "layers.3"})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    theirs = f"{THEIRS[name]}_transcoder".removeprefix("standard_") if transcodes else THEIRS[name]
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (theirs, D, F, "float32")
    assert cfg["apply_b_dec_to_input"] is not transcodes
    assert cfg.get("d_out") == (D_OUT if transcodes else None)
    assert cfg["metadata"]["site"] == "layers.3"
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    width = D_OUT if transcodes else D
    wanted: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "W_dec": (F, width), "b_dec": (width,)}
    biases = ("b_gate", "r_mag", "b_mag") if name == "gated" else ("b_enc",)
    wanted |= dict.fromkeys(biases, (F,)) | ({"threshold": (F,)} if THEIRS[name] == "jumprelu" else {})
    assert shapes == wanted


def random_tensors(*names: str, seed: int = 0, width: int = D, out: int = D) -> dict[str, Tensor]:
    """By their names in SAELens; decoder rows of all lengths, thresholds of all sizes."""
    dice = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (width, F), "W_dec": (F, out), "b_dec": (out,)} | dict.fromkeys(names, (F,))
    found = {name: torch.randn(shape, generator=dice) for name, shape in shapes.items()}
    found["W_enc"] /= 4
    if "threshold" in found:
        found["threshold"] = found["threshold"].abs() + 1
    return found


@pytest.mark.parametrize("takes_off", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_what_saelens_wrote_gives_its_values(
    architecture: str, dtype: torch.dtype, takes_off: bool, tmp_path: Path
) -> None:
    own = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}
    tensors = {name: t.to(dtype) for name, t in random_tensors(*own.get(architecture, ("b_enc",))).items()}
    settings = {"k": K} if architecture == "topk" else {}
    write_saelens(tmp_path, architecture, tensors, apply_b_dec_to_input=takes_off, **settings)
    sae, x = load_sae(tmp_path), rows()
    p = {name: tensor.double() for name, tensor in tensors.items()}
    product = (x.double() - takes_off * p["b_dec"]) @ p["W_enc"]
    match architecture:
        case "gated":
            gate = product + p["b_gate"] > 0
            wanted = gate * (p["r_mag"].exp() * product + p["b_mag"]).clamp(min=0)
        case "topk":
            pre = product + p["b_enc"]
            wanted = torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre, 0).clamp(min=0)
        case "jumprelu":
            pre = product + p["b_enc"]
            wanted = torch.where(pre > p["threshold"], pre, 0)
        case _:
            wanted = (product + p["b_enc"]).clamp(min=0)
    assert_values(sae, x, wanted)
    got = values_of(sae, x)
    torch.testing.assert_close(sae.reconstruct(x).double(), got @ p["W_dec"] + p["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_values_by_decoder_length_are_those_of_unit_directions(architecture: str, tmp_path: Path) -> None:
    """Also: a folder that SAELens saved in the midst of training, with one threshold for all."""
    tensors = random_tensors("b_enc")
    settings: dict[str, Any] = {"k": K, "rescale_acts_by_decoder_norm": True}
    if architecture != "topk":
        tensors["topk_threshold"] = torch.tensor(12.0, dtype=torch.float64)
        settings["k"] = 5.5
    if architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [10, 50, F]
    sae, x = load_sae(write_saelens(tmp_path, architecture, tensors, **settings)), rows()
    p = {name: tensor.double() for name, tensor in tensors.items()}
    lengths = p["W_dec"].norm(dim=1)
    pre = ((x.double() - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * lengths
    cut = pre.topk(K, dim=1).values[:, -1:] if architecture == "topk" else 12.0
    wanted = torch.where(pre >= cut, pre, 0).clamp(min=0)
    assert_values(sae, x, wanted)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    again = values_of(sae, x) / lengths @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x).double(), again, rtol=1e-4, atol=1e-4)
    assert sae.config.architecture == architecture.removesuffix("_batchtopk")
    assert sae.config.nested == ([10, 50, F] if "prefixes" in sae.config.model_fields_set else [F])


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder"])
def test_a_transcoder_of_saelens_reads_what_is_there(architecture: str, tmp_path: Path) -> None:
    tensors = random_tensors("b_enc", *(["threshold"] if "jump" in architecture else []), out=D_OUT)
    about = {"apply_b_dec_to_input": False, "d_out": D_OUT, "metadata": {"hook_name_out": "blocks.0.mlp"}}
    sae, x = load_sae(write_saelens(tmp_path, architecture, tensors, **about)), rows()
    pre = x.double() @ tensors["W_enc"].double() + tensors["b_enc"].double()
    assert_values(sae, x, torch.where(pre > tensors.get("threshold", torch.zeros(1)).double(), pre, 0))
    assert sae.config.target_site == "blocks.0.mlp"
    assert sae.reconstruct(x).shape == (B, D_OUT)


def test_folders_of_saelens_before_6_are_read(tmp_path: Path) -> None:
    tensors = random_tensors("b_enc")
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    sae = load_sae(write_saelens(tmp_path, "standard", tensors, **old))
    assert (sae.config.architecture, sae.config.k) == ("topk", K)


def test_a_threshold_below_zero_is_one_of_zero(tmp_path: Path) -> None:
    """As both programs have it: values are of ReLU first."""
    tensors = random_tensors("b_enc", "threshold")
    tensors["threshold"][::2] *= -1
    sae, x = load_sae(write_saelens(tmp_path, "jumprelu", tensors)), rows()
    pre = (x.double() - tensors["b_dec"].double()) @ tensors["W_enc"].double() + tensors["b_enc"].double()
    assert_values(sae, x, pre.clamp(min=0) * (pre > tensors["threshold"].double()))


# dictionary_learning ------------------------------------------------------------------------------------------------

LINEAR = ("encoder.weight", "decoder.weight", "encoder.bias")
CLASSES: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*LINEAR, "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "k", "threshold"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"),
    "JumpReluAutoEncoder": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "W_dec", "b_enc", "b_dec", "k", "threshold", "group_sizes"),
}
"""Their state_dict, by class."""


def state_of(dict_class: str, seed: int = 0) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (F, D), "decoder.weight": (D, F), "W_enc": (D, F), "W_dec": (F, D)}
    shapes |= dict.fromkeys(("bias", "b_dec", "decoder_bias", "decoder.bias"), (D,))
    shapes |= dict.fromkeys(("encoder.bias", "b_enc", "gate_bias", "mag_bias", "r_mag"), (F,))
    given = {"k": torch.tensor(K), "group_sizes": torch.tensor([10, 40, F - 50]), "threshold": torch.tensor(3.0)}
    if dict_class == "JumpReluAutoEncoder":
        given["threshold"] = torch.linspace(0.5, 4.0, F)
    return {
        name: given[name] if name in given else torch.randn(shapes[name], generator=dice) / 3
        for name in CLASSES[dict_class]
    }


def write_dictionary(folder: Path, dict_class: str, state: Any, /, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    about = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "k": K, "lm_name": "pythia", "layer": 3}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer, "buffer": {"ctx_len": 128}}))
    return folder


@pytest.mark.parametrize("dict_class", CLASSES)
def test_what_dictionary_learning_wrote_gives_its_values(dict_class: str, tmp_path: Path) -> None:
    state, x = state_of(dict_class), rows()
    sizes = {"group_sizes": [10, 40, F - 50]} if dict_class.startswith("Matryoshka") else {}
    sae = load_sae(write_dictionary(tmp_path, dict_class, state, **sizes))
    p, wide = {name: tensor.double() for name, tensor in state.items()}, x.double()
    w_dec = p["W_dec"] if "W_dec" in p else p["decoder.weight"].t()
    match dict_class:
        case "AutoEncoder":
            b_dec, wanted = p["bias"], tensor_relu((wide - p["bias"]) @ p["encoder.weight"].t() + p["encoder.bias"])
        case "AutoEncoderNew":
            b_dec, wanted = p["decoder.bias"], tensor_relu(wide @ p["encoder.weight"].t() + p["encoder.bias"])
        case "AutoEncoderTopK" | "BatchTopKSAE":
            b_dec = p["b_dec"]
            pre = tensor_relu((wide - b_dec) @ p["encoder.weight"].t() + p["encoder.bias"])
            top = pre.topk(K, dim=1).values[:, -1:]
            wanted = pre * (pre >= top if dict_class == "AutoEncoderTopK" else pre > 3.0)
        case "GatedAutoEncoder":
            b_dec = p["decoder_bias"]
            inner = (wide - b_dec) @ p["encoder.weight"].t()
            wanted = (inner + p["gate_bias"] > 0) * tensor_relu(p["r_mag"].exp() * inner + p["mag_bias"])
        case "JumpReluAutoEncoder":
            b_dec, pre = p["b_dec"], wide @ p["W_enc"] + p["b_enc"]
            wanted = tensor_relu(pre * (pre > p["threshold"]))
        case _:
            b_dec = p["b_dec"]
            pre = tensor_relu((wide - b_dec) @ p["W_enc"] + p["b_enc"])
            wanted = pre * (pre > 3.0)
            assert sae.config.nested == [10, 50, F]
    assert_values(sae, x, wanted)
    again = values_of(sae, x) @ w_dec + b_dec
    torch.testing.assert_close(sae.reconstruct(x).double(), again, rtol=1e-4, atol=1e-4)


def tensor_relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def test_a_threshold_that_was_never_set_lets_every_positive_value_pass(tmp_path: Path) -> None:
    state, x = state_of("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}, rows()
    sae = load_sae(write_dictionary(tmp_path, "BatchTopKSAE", state))
    pre = (x.double() - state["b_dec"].double()) @ state["encoder.weight"].double().t() + state["encoder.bias"].double()
    assert_values(sae, x, pre.clamp(min=0))


class _Harm:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_of_torch_that_holds_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    write_dictionary(tmp_path / "sae", "AutoEncoder", state_of("AutoEncoder") | {"x": _Harm(harmed)})
    with pytest.raises(UserError, match=r"ae\.pt cannot be read as tensors alone.*never run"):
        load_sae(tmp_path / "sae")
    assert not harmed.exists()


# refusals -----------------------------------------------------------------------------------------------------------


ODD = [float("nan"), float("inf"), float("-inf"), 10**400]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "temporal"}, r'architecture is "temporal"; saeflow reads "standard"'),
        (
            {"architecture": "skip_transcoder", "apply_b_dec_to_input": False, "d_out": D},
            r"lacks W_skip, which relu needs",
        ),
        (
            {"normalize_activations": "covariance_whitening"},
            r'normalize_activations is "covariance_whitening"; saeflow reads "none"',
        ),
        ({"normalize_activations": True}, r"fold_activation_norm_scaling_factor"),
        ({"activation_fn": "tanh-relu"}, r'activation_fn is "tanh-relu"; saeflow reads "relu"'),
        ({"reshape_activations": "heads"}, r"reshape_activations"),
        ({"apply_b_dec_to_input": "yes"}, r'apply_b_dec_to_input is "yes"; saeflow reads true, false'),
        ({"d_in": None}, r"d_in is null; it has to be a whole number above 0"),
        ({"d_sae": 2.5}, r"d_sae is 2\.5"),
        ({"d_in": D + 1}, rf"W_enc is {D} × {F}, but cfg\.json says {D + 1} × {F}"),
        ({"architecture": "topk", "k": F + 1}, rf"k is {F + 1}, more than its {F} features"),
        ({"architecture": "topk", "k": 0}, r"k is 0; it has to be a whole number above 0"),
        ({"architecture": "jumprelu"}, r"lacks threshold, which jumprelu needs"),
        ({"architecture": "gated"}, r"lacks b_gate, b_mag, r_mag"),
        ({"architecture": "transcoder"}, r"apply_b_dec_to_input is true; saeflow reads false"),
        (
            {"architecture": "gated", "rescale_acts_by_decoder_norm": True},
            r"rescale_acts_by_decoder_norm is true; .*fold_W",
        ),
        ({"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True}, r"saeflow reads false"),
        *(({"architecture": "topk", "k": k}, r"k is (NaN|-?Infinity|1000)") for k in ODD),
        *(({"architecture": "batchtopk", "k": k}, r"k is (NaN|-?Infinity|1000)") for k in ODD),
        ({"d_sae": 10**400}, r"d_sae is 10000.*\.\.\.; it has to be a whole number above 0"),
        (
            {"activation_fn": "topk", "activation_fn_kwargs": "k=3"},
            r'activation_fn_kwargs is "k=3"; it has to be a table',
        ),
        (
            {"metadata": {"saeflow": {"n_features": F, "architecture": "relu", "seed": 10**30}}},
            r"metadata\.saeflow is not understood \(seed:",
        ),
        ({"metadata": {"saeflow": {"arch": 1}}}, r"metadata\.saeflow is not understood \(arch:"),
        ({"metadata": {"saeflow": {"n_features": 9, "architecture": "relu"}}}, r"d_sae is 160, but 9 follows"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard", random_tensors("b_enc"), **change)
    with pytest.raises(UserError, match=reason) as refused:
        load_sae(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"b_enc": None}, r"lacks b_enc, which relu needs; it holds W_dec, W_enc, b_dec"),
        ({"W_skip": torch.zeros(D, D)}, r"holds W_skip, which relu has not"),
        ({"scaling_factor": torch.full((F,), 2.0)}, r"holds scaling_factor, which relu has not"),
        ({"b_dec": torch.full((D,), torch.nan)}, r"b_dec holds NaN or infinite values"),
        ({"W_enc": torch.full((D, F), 1e300, dtype=torch.float64)}, r"W_enc holds NaN or infinite values"),
        ({"b_enc": torch.zeros(F, dtype=torch.int64)}, r"b_enc holds torch\.int64, not real numbers"),
        ({"b_enc": torch.zeros(F, 1)}, rf"b_enc is {F} × 1, but cfg\.json says {F}"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in (random_tensors("b_enc") | change).items() if t is not None}
    write_saelens(tmp_path, "standard", tensors, d_in=D, d_sae=F)
    with pytest.raises(UserError, match=reason):
        load_sae(tmp_path)


def test_settings_nested_without_end_are_refused(tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard", random_tensors("b_enc"))
    (tmp_path / "cfg.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"cfg\.json is damaged"):
        load_sae(tmp_path)


def test_damaged_and_missing_files_are_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No cfg\.json in .*config\.json and ae\.pt"):
        load_sae(tmp_path)
    folder = write_saelens(tmp_path / "a", "standard", random_tensors("b_enc"))
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is damaged.*Copy the folder again"):
        load_sae(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"No sae_weights\.safetensors in"):
        load_sae(folder)
    weights.touch()
    for text in ("{", "[1]", "\xff"):
        (folder / "cfg.json").write_text(text, "latin-1")
        with pytest.raises(UserError, match=r"cfg\.json is damaged.*Copy the folder again"):
            load_sae(folder)


@pytest.mark.parametrize(
    ("trainer", "state", "reason"),
    [
        ({"dict_class": "CrossCoder"}, {}, r'dict_class is "CrossCoder"; saeflow reads "AutoEncoder"'),
        ({"dict_size": 7}, {}, rf"W_enc is {D} × {F}, but config\.json says {D} × 7"),
        ({"activation_dim": "many"}, {}, r'activation_dim is "many"'),
        ({}, {"bias": torch.zeros(D - 1)}, rf"b_dec is {D - 1}, but config\.json says {D}"),
        ({"dict_class": "GatedAutoEncoder"}, {}, r"lacks b_gate, b_mag, r_mag"),
        ({"group_sizes": 3, "dict_class": "MatryoshkaBatchTopKSAE"}, {}, r"group_sizes is 3; it has to be a list"),
    ],
)
def test_a_dictionary_that_cannot_be_read_says_why(
    trainer: dict[str, Any], state: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    write_dictionary(tmp_path, "AutoEncoder", state_of("AutoEncoder") | state, **trainer)
    with pytest.raises(UserError, match=reason):
        load_sae(tmp_path)


def test_a_dictionary_that_is_no_table_of_tensors_is_refused(tmp_path: Path) -> None:
    write_dictionary(tmp_path, "AutoEncoder", [torch.zeros(3)])
    with pytest.raises(UserError, match=r"ae\.pt is no table of tensors"):
        load_sae(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"ae\.pt cannot be read as tensors alone"):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has no table `trainer`"):
        load_sae(tmp_path)


def test_a_saved_folder_whose_two_accounts_of_it_differ_is_refused(tmp_path: Path) -> None:
    save_sae(trained("batchtopk"), tmp_path, {})
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file(tensors | {"threshold": torch.from_numpy(np.linspace(1, 2, F, dtype=np.float32))}, tmp_path / FILES[1])
    with pytest.raises(UserError, match=r"threshold has several values.*batchtopk"):
        load_sae(tmp_path)
