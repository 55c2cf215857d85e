"""Made-up autoencoders in every published layout, each with its formula in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.small_saes import D, F, K

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """Where an autoencoder lies, and what its program makes of rows: pre-activations, values, reconstructions."""

    source: Path
    pre: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    asked: dict[str, Any]


def draw(seed: int = 0, out: int = D) -> Tensors:
    """W_enc (D, F), W_dec (F, D_out) with rows of all lengths, biases, and thresholds of all sizes."""
    dice = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, out), "b_enc": (F,), "b_dec": (out,), "threshold": (F,), "skip": (out, D)}
    made = {name: torch.randn(shape, generator=dice) for name, shape in shapes.items()}
    return made | {"W_enc": made["W_enc"] / 4, "threshold": made["threshold"].abs() + 1}


def wide(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def write_json(path: Path, about: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about))


def tensors_to(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def keep_top(pre: Tensor, k: int = K) -> Tensor:
    return torch.where(pre >= pre.topk(k, dim=1).values[:, -1:], pre, 0).clamp(min=0)


def plain(
    source: Path, p: Tensors, act: Callable[[Tensor], Tensor], minus: float = 0.0, skip: float = 0.0, **asked: Any
) -> Published:
    """The usual formula; `minus` 1 subtracts the decoder bias first, `skip` 1 adds the skip connection."""
    p = wide(p)

    def pre(x: Tensor) -> Tensor:
        return (x.double() - minus * p["b_dec"][: x.shape[1]]) @ p["W_enc"] + p["b_enc"]

    def values(x: Tensor) -> Tensor:
        return act(pre(x))

    def reconstruct(x: Tensor) -> Tensor:
        return values(x) @ p["W_dec"] + p["b_dec"] + skip * (x.double() @ p["skip"].t())

    return Published(source, pre, values, reconstruct, asked)


def jump(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda pre: torch.where(pre > threshold.double(), pre, 0)


def keep_largest(pre: Tensor) -> Tensor:
    return torch.where(pre.abs() >= pre.abs().topk(K, dim=1).values[:, -1:], pre, 0)


def sparsify(folder: Path, transcodes: bool = False, skips: bool = False, signed: bool = False) -> Published:
    p = draw(1)
    tensors = {"encoder.weight": p["W_enc"].t(), "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    tensors |= {"W_skip": p["skip"]} if skips else {}
    about = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K,
             "multi_topk": True, "skip_connection": skips, "transcode": transcodes, "d_in": D}  # fmt: skip
    about |= {"signed": True} if signed else {}
    write_json(folder / "layers.0.mlp" / "cfg.json", about)
    tensors_to(folder / "layers.0.mlp" / "sae.safetensors", tensors)
    asked = {"target_site": "other"} if transcodes else {}
    act = keep_largest if signed else keep_top
    return plain(folder / "layers.0.mlp", p, act, 1 - transcodes, skips, **asked)


def gemma_scope(folder: Path, kind: str = "gemma-scope-2b-pt-res") -> Published:
    p = draw(2)
    inside = folder / kind / "layer_0" / "width_16k" / "average_l0_71"
    tensors_to(inside / "params.npz", {name: tensor for name, tensor in p.items() if name != "skip"})
    asked = {"target_site": "other"} if "transcoder" in kind else {}
    return plain(inside, p, jump(p["threshold"]), **asked)


def gemma_scope_2(folder: Path, transcodes: bool = False, skips: bool = False) -> Published:
    p = draw(3)
    tensors = {name.lower(): tensor for name, tensor in p.items() if name != "skip"}
    tensors |= {"affine_skip_connection": p["skip"].t()} if skips else {}
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "width": F, "l0": 60,
             "hf_hook_point_in": "model.layers.0.output", "affine_connection": skips}  # fmt: skip
    if transcodes:
        about |= {"hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output",
                  "hf_hook_point_out": "model.layers.0.post_feedforward_layernorm.output"}  # fmt: skip
    write_json(folder / "config.json", about)
    tensors_to(folder / "params.safetensors", tensors)
    return plain(folder, p, jump(p["threshold"]), 0, skips, **({"target_site": "other"} if transcodes else {}))


def qwen_scope(folder: Path) -> Published:
    p = draw(4)
    tensors = {"W_enc": p["W_enc"].t(), "W_dec": p["W_dec"].t(), "b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    path = tensors_to(folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer0.sae.pt", tensors)
    return plain(path, p, keep_top)


def torch_file(folder: Path) -> Published:
    p = draw(5)
    tensors = {
        "encoder_linear.weight": p["W_enc"].t(), "encoder_linear.bias": p["b_enc"],
        "decoder_linear.weight": p["W_dec"].t(), "decoder_linear.bias": p["b_dec"],
    }  # fmt: skip
    return plain(tensors_to(folder / "Llama-3.3-SAE-l0.pt", tensors), p, lambda pre: pre.clamp(min=0))


def circuit_tracer(folder: Path) -> Published:
    p = draw(9)
    tensors = {name: p[name] for name in ("W_dec", "b_enc", "b_dec")} | {"W_enc": p["W_enc"].t(), "W_skip": p["skip"]}
    path = tensors_to(folder / "layer_0.safetensors", tensors)
    return plain(path, p, lambda pre: pre.clamp(min=0), 0, 1, target_site="other")


def attention(folder: Path) -> Published:
    """A file with settings beside it, for the outputs of the heads one after another."""
    p = draw(10)
    write_json(folder / "gpt2_L0_z_cfg.json", {"act_size": D, "dict_size": F, "act_name": "blocks.0.attn.hook_z"})
    path = tensors_to(folder / "gpt2_L0_z.pt", {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    return plain(path, p, lambda pre: pre.clamp(min=0), 1)


def llama_scope(folder: Path, act_fn: str = "jumprelu") -> Published:
    """Decoder rows of unit length, as published; activations scaled by root(D) / 6.5, values in their own units."""
    p = draw(6)
    p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    factor = math.sqrt(D) / 6.5
    tensors = {
        "encoder.weight": p["W_enc"].t(), "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].t(), "decoder.bias": p["b_dec"],
    }  # fmt: skip
    hook = "blocks.0.hook_resid_post"
    write_json(folder / "hyperparams.json", {
        "act_fn": act_fn, "d_model": D, "d_sae": F, "jump_relu_threshold": 1.25, "top_k": K, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "hook_point_in": hook,
        "hook_point_out": hook, "norm_activation": "dataset-wise", "use_glu_encoder": False,
        "dataset_average_activation_norm": {"in": 6.5, "out": 6.5},
    })  # fmt: skip
    tensors_to(folder / "checkpoints" / "final.safetensors", tensors)
    p |= {"b_enc": p["b_enc"].double() / factor, "b_dec": p["b_dec"].double() / factor}
    return plain(folder, p, keep_top if act_fn == "topk" else jump(torch.tensor(1.25)))


def openmoss(folder: Path) -> Published:
    """Thresholds compare scaled values times the length of their decoder row; a transcoder of two scales."""
    p = draw(7)
    p["W_dec"] = p["W_dec"] / 3
    tensors = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": p["W_dec"], "b_D": p["b_dec"],
               "activation_function.log_jumprelu_threshold": p["threshold"].log()}  # fmt: skip
    hooks = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
    lengths = 6.5, 2.5
    tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(length)
                for hook, length in zip(hooks, lengths, strict=True)}  # fmt: skip
    write_json(folder / "config.json", {
        "sae_type": "sae", "act_fn": "jumprelu", "d_model": D, "expansion_factor": F / D, "use_decoder_bias": True,
        "hook_point_in": hooks[0], "hook_point_out": hooks[1], "norm_activation": "dataset-wise", "top_k": K,
        "sparsity_include_decoder_norm": True,
    })  # fmt: skip
    tensors_to(folder / "sae_weights.safetensors", tensors)
    read, out = (math.sqrt(D) / length for length in lengths)
    q = wide(p)
    cut = q["threshold"] / q["W_dec"].norm(dim=1) / read
    q |= {"b_enc": q["b_enc"] / read, "b_dec": q["b_dec"] / out, "W_dec": q["W_dec"] * read / out}
    return plain(folder, q, jump(cut), target_site="other")


def saelens(folder: Path, kind: str) -> Published:
    """An SAE of SAELens with one of its ways to normalise, or a skip transcoder, or settings of version 3."""
    p = draw(8)
    cfg: dict[str, Any] = {"architecture": "standard", "d_in": D, "d_sae": F, "apply_b_dec_to_input": True}
    tensors = {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    made = plain(folder, p, lambda pre: pre.clamp(min=0), 1)
    match kind:
        case "constant_norm_rescale" | "layer_norm":
            cfg["normalize_activations"] = kind
            made = _normalised(made, kind)
        case "expected_average_only_in":
            cfg["normalize_activations"] = True
            write_json(folder / "activation_scaler.json", {"scaling_factor": 0.7})
            made = _scaled(made, 0.7)
        case "constant_scalar_rescale":
            cfg |= {"normalize_activations": kind, "activation_normalization_factor": 1.7}
            made = _scaled(made, 1.7)
        case "finetuned":
            cfg |= {"finetuning_scaling_factor": True, "hook_point": "blocks.0.hook_resid_post"}
            del cfg["architecture"]
            tensors["scaling_factor"] = p["threshold"]
            made = plain(folder, p, lambda pre: pre.clamp(min=0), 1)
            q = wide(p)

            def reconstruct(x: Tensor, values: Callable[[Tensor], Tensor] = made.values) -> Tensor:
                return (values(x) * q["threshold"]) @ q["W_dec"] + q["b_dec"]

            made = Published(folder, made.pre, made.values, reconstruct, {})
        case "skip_transcoder" | "jumprelu_skip_transcoder":
            cfg |= {"architecture": kind, "apply_b_dec_to_input": False, "d_out": D}
            tensors["W_skip"] = p["skip"]
            tensors |= {"threshold": p["threshold"]} if "jump" in kind else {}
            act = jump(p["threshold"]) if "jump" in kind else lambda pre: pre.clamp(min=0)
            made = plain(folder, p, act, 0, 1, target_site="other")
    write_json(folder / "cfg.json", cfg)
    tensors_to(folder / "sae_weights.safetensors", tensors)
    tensors_to(folder / "sparsity.safetensors", {"sparsity": torch.zeros(F)})
    return made


def _scaled(made: Published, factor: float) -> Published:
    def at(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x.double() * factor)

    return Published(
        made.source, lambda x: at(made.pre, x), lambda x: at(made.values, x),
        lambda x: at(made.reconstruct, x) / factor, {},
    )  # fmt: skip


def _normalised(made: Published, kind: str) -> Published:
    def shift_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "layer_norm":
            return x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        return torch.zeros(len(x), 1), x.norm(dim=1, keepdim=True) / math.sqrt(D)

    def read(x: Tensor) -> Tensor:
        shift, length = shift_and_length(x.double())
        return (x.double() - shift) / (length + (1e-5 if kind == "layer_norm" else 0))

    def reconstruct(x: Tensor) -> Tensor:
        shift, length = shift_and_length(x.double())
        return made.reconstruct(read(x)) * length + shift

    return Published(made.source, lambda x: made.pre(read(x)), lambda x: made.values(read(x)), reconstruct, {})


LAYOUTS: dict[str, Callable[[Path], Published]] = {
    "sparsify": sparsify,
    "sparsify signed": lambda folder: sparsify(folder, signed=True),
    "sparsify signed transcoder": lambda folder: sparsify(folder, transcodes=True, signed=True),
    "sparsify transcoder": lambda folder: sparsify(folder, transcodes=True),
    "sparsify skip transcoder": lambda folder: sparsify(folder, transcodes=True, skips=True),
    "sparsify with a skip connection": lambda folder: sparsify(folder, skips=True),
    "Gemma Scope": gemma_scope,
    "Gemma Scope transcoder": lambda folder: gemma_scope(folder, "gemma-scope-2b-pt-transcoders"),
    "Gemma Scope 2": gemma_scope_2,
    "Gemma Scope 2 transcoder": lambda folder: gemma_scope_2(folder, transcodes=True),
    "Gemma Scope 2 affine transcoder": lambda folder: gemma_scope_2(folder, transcodes=True, skips=True),
    "Qwen-Scope": qwen_scope,
    "torch file": torch_file,
    "attention": attention,
    "circuit-tracer": circuit_tracer,
    "Llama Scope": llama_scope,
    "Llama Scope topk": lambda folder: llama_scope(folder, "topk"),
    "OpenMOSS": openmoss,
    **{
        f"SAELens {kind}": lambda folder, kind=kind: saelens(folder, kind)  # type: ignore[misc]
        for kind in (
            "constant_norm_rescale", "layer_norm", "expected_average_only_in", "constant_scalar_rescale", "finetuned",
            "skip_transcoder", "jumprelu_skip_transcoder",
        )
    },
}  # fmt: skip
