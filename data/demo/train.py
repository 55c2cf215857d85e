"""Train the demonstration language model: one GPT-2 block with 512 ReLU neurons, on one processor core."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

Tokens = NDArray[np.uint16]

CONTEXT = 256


class Schedule(NamedTuple):
    """Every number of the training run; window positions depend on `seed` and the step alone."""

    steps: int
    batch: int = 16
    muon_rate: float = 0.02
    adam_rate: float = 0.02
    weight_decay: float = 0.01
    warmup: int = 100
    seed: int = 0


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, bfloat16 products, a few rows of logits in memory at a time.

    The gradient is made in the forward pass, while a chunk's logits are still in cache.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
        hidden16, weight16 = hidden.bfloat16(), weight.bfloat16()
        grad_hidden = -weight[targets]
        grad_weight = torch.zeros_like(weight).index_add_(0, targets, hidden, alpha=-1)
        total = (hidden * grad_hidden).sum()
        for start in range(0, len(hidden), rows):
            part = hidden16[start : start + rows]
            logits = part @ weight16.T
            peak = logits.amax(1, keepdim=True).float()
            powers = torch.sub(logits, peak).exp_()
            norm = powers.sum(1, keepdim=True)
            total += (norm.log() + peak).sum()
            powers16 = powers.bfloat16()
            grad_hidden[start : start + rows] += (powers16 @ weight16) / norm
            grad_weight += powers16.T @ (part / norm).bfloat16()
        ctx.save_for_backward(grad_hidden.div_(len(hidden)), grad_weight.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad[0] * grad_hidden, grad[0] * grad_weight, None, None


def new_model(vocabulary: int, end_of_text: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=1,
        n_head=4,
        n_inner=512,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, windows: Tensor) -> Tensor:
    """Mean nats a token of windows (B, CONTEXT + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(windows[:, :-1], use_cache=False).last_hidden_state
    loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.float().flatten(0, 1), model.lm_head.weight, windows[:, 1:].flatten()
    )
    return loss


def optimizers(model: GPT2LMHeadModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the block's matrices (Jordan et al. 2024), AdamW for embeddings, output, biases and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    decay = schedule.weight_decay
    return [
        torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=schedule.adam_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]


def rate(step: int, schedule: Schedule) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / schedule.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))


def windows(tokens: Tokens, step: int, schedule: Schedule) -> Tensor:
    """The random windows (B, CONTEXT + 1) of one step."""
    generator = np.random.default_rng([schedule.seed, step])
    starts = generator.integers(0, len(tokens) - CONTEXT, schedule.batch)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))


class Trainer:
    """Model, optimisers and the step they have reached; `save` and `resume` keep all three in one safetensors file."""

    def __init__(self, model: GPT2LMHeadModel, schedule: Schedule) -> None:
        self.model, self.schedule, self.step = model, schedule, 0
        self.optimizers = optimizers(model, schedule)
        self.peak_rates = [[group["lr"] for group in each.param_groups] for each in self.optimizers]

    def advance(self, batch: Tensor) -> float:
        """One optimiser step; the loss before it, nats a token."""
        scale = rate(self.step, self.schedule)
        loss = loss_of(self.model, batch)
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, peaks in zip(self.optimizers, self.peak_rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for at, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{at}/{index}/{name}": value for name, value in state.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"step": str(self.step), "schedule": json.dumps(self.schedule)})
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a saved state; one of another schedule is an error."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["schedule"] != json.dumps(self.schedule):
            raise ValueError(f"{path} belongs to another schedule, {metadata['schedule']}. Delete it to start again.")
        tensors = load_file(path)
        self.step = int(metadata["step"])
        self.model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k[:6] == "model/"})
        for at, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in tensors if key.startswith(f"{at}/")):
                _, index, name = key.split("/")
                state.setdefault(int(index), {})[name] = tensors[key]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def scored_windows(documents: list[Tokens], end_of_text: int, stride: int = 128) -> tuple[Tensor, Tensor]:
    """Inputs and targets (windows, CONTEXT) that hold every token of each document and its closing mark once.

    A document begins with the mark. Windows advance by `stride`, so a token has at least
    CONTEXT - stride tokens before it, or all that its document has. Targets not scored are -100.
    """
    inputs, targets = [], []
    for document in documents:
        stream = np.concatenate([[end_of_text], document, [end_of_text]]).astype(np.int64)
        for start in range(0, max(len(stream) - 1 - CONTEXT, 0) + stride, stride):
            window = np.full((2, CONTEXT), end_of_text)
            n = len(stream[start : start + CONTEXT + 1]) - 1
            window[0, :n], window[1] = stream[start : start + n], -100
            first = 0 if start == 0 else CONTEXT - stride
            window[1, first:n] = stream[start + first + 1 : start + n + 1]
            inputs.append(window[0])
            targets.append(window[1])
    return torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))


@torch.no_grad()
def nats(model: GPT2LMHeadModel, inputs: Tensor, targets: Tensor) -> float:
    """Mean nats of the scored targets, in float32."""
    model.eval()  # type: ignore[no-untyped-call]
    total = 0.0
    for part, wanted in zip(torch.split(inputs, 16), torch.split(targets, 16), strict=True):
        logits = model(part, use_cache=False).logits
        total += cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    model.train()
    return total / int((targets >= 0).sum())
