"""Train an autoencoder with a peer's own step, or read one it saved: a JSON object in, a JSON line out, the last.

Runs with the interpreter of `make peers` and imports nothing of ours; `_peers.py` calls it. The peers' packages print
lines of their own before.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

Apply = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Rows (n, D) to how often each feature fired (F,) and the reconstruction (n, D)."""

PENALTY = {"relu": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}
NESTED = (1, 3, 7, 15, 32)
"""Sizes of matryoshka's dictionaries in 32nds of F: what saeflow takes when none are given."""


@dataclass(frozen=True)
class Training:
    """What is trained, on what and how: the keys of the JSON object."""

    peer: Literal["saelens", "sparsify"]
    architecture: Literal["topk", "batchtopk", "relu", "jumprelu", "gated", "matryoshka"]
    data: str
    """A .npy of float32 rows (n, D); read again in another order when the steps take more."""
    held_out: str
    n_features: int
    k: int
    """Also jumprelu's target; relu and gated ignore it."""
    n_steps: int
    """All steps, those of the warm-up too."""
    warmup_steps: int = 0
    """The first of them, which train and are not timed."""
    n_timed: int | None = None
    """How many of the steps after those are timed; None takes the rest, 0 none."""
    batch: int = 4096
    lr: float = 1e-3
    lr_warmup_steps: int = 0
    optimizer: Literal["adam", "signum"] = "adam"
    """signum is sparsify's default: signs of averaged gradients, at one rate throughout."""
    decay_steps: int = 0
    """The last steps, over which the learning rate falls in a line to zero."""
    autocast: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    is_scored: bool = True
    """False if only the speed is asked."""
    threads: int | None = None
    seed: int = 0
    penalty: float | None = None
    """Coefficient of the sparsity loss (relu, gated, jumprelu); None is the peer's default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the peer's own configuration, such as SAELens' `use_sparse_activations`."""
    save: str | None = None


class Fitted(NamedTuple):
    inference: Apply
    as_trained: Apply
    """With the choice of features made over the batch where training makes it so."""
    package: str


class Feed(Iterator[torch.Tensor]):
    """Batches of shuffled rows, and the seconds its reader spends on each.

    A step lasts from a batch's handing over to the next one's being asked for, so the making of batches is nobody's
    time.
    """

    def __init__(self, rows: np.ndarray, batch: int, seed: int, device: str = "cpu") -> None:
        if len(rows) < batch:
            raise ValueError(f"data has {len(rows)} rows, fewer than a batch of {batch}.")
        self.device = device
        self.seconds: list[float] = []
        self._given: float | None = None
        self._batches = self._forever(rows, batch, np.random.default_rng(seed))

    def __next__(self) -> torch.Tensor:
        self.close_step()
        batch = next(self._batches).to(self.device)
        self._wait()
        self._given = time.perf_counter()
        return batch

    def close_step(self) -> None:
        if self._given is not None:
            self._wait()
            self.seconds.append(time.perf_counter() - self._given)
            self._given = None

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _forever(rows: np.ndarray, batch: int, draw: np.random.Generator) -> Iterator[torch.Tensor]:
        while True:
            order = draw.permutation(len(rows))
            for start in range(0, len(rows) - batch + 1, batch):
                yield torch.from_numpy(rows[order[start : start + batch]])


def saelens(about: Training, width: int, feed: Feed) -> Fitted:
    from sae_lens import SAE, SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    names = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}
    build, config = get_sae_training_class(names.get(about.architecture, about.architecture))
    trained = build(config(d_in=width, d_sae=about.n_features, device=about.device, **saelens_options(about)))
    trainer_config = SAETrainerConfig(
        total_training_samples=about.n_steps * about.batch, train_batch_size_samples=about.batch,
        lr=about.lr, lr_end=0.0, lr_warm_up_steps=about.lr_warmup_steps,
        lr_decay_steps=about.decay_steps, autocast=about.autocast, device=about.device,
    )  # fmt: skip
    SAETrainer(trainer_config, trained, feed).fit()
    feed.close_step()
    if not about.is_scored:
        return Fitted(saelens_apply(trained), saelens_apply(trained), "sae-lens")
    with contextlib.ExitStack() as stack:
        folder = about.save or stack.enter_context(tempfile.TemporaryDirectory())
        trained.save_inference_model(folder)
        inference = SAE.load_from_disk(folder)
    inference.to(about.device)
    return Fitted(saelens_apply(inference.eval()), saelens_apply(trained.eval()), "sae-lens")


def saelens_options(about: Training) -> dict[str, Any]:
    """Fields of its configuration that say what `k`, `penalty` and `options` ask."""
    own: dict[str, Any] = {}
    if about.architecture in ("topk", "batchtopk", "matryoshka"):
        own["k"] = about.k
    if about.architecture == "matryoshka":
        own["matryoshka_widths"] = [about.n_features * share // 32 for share in NESTED]
    if about.architecture == "jumprelu":
        own |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": about.k}
    if about.penalty is not None:
        own[PENALTY[about.architecture]] = about.penalty
    return own | about.options


def saelens_apply(autoencoder: Any) -> Apply:
    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = autoencoder.encode(rows).to_dense()
        return (values != 0).sum(0), autoencoder.decode(values)

    return apply


def sparsify(about: Training, width: int, feed: Feed) -> Fitted:
    """Its trainer wants a language model around it, so this is the step of that trainer around its `SparseCoder`.

    Like there, the decoder's bias starts at the first batch's mean, decoder rows are brought to unit length before each
    forward pass and lose the gradient along themselves after it.
    """
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig

    if about.architecture != "topk":
        raise ValueError(f"sparsify has topk alone, not {about.architecture}.")
    of_coder = {each.name for each in fields(SparseCoderConfig)} & about.options.keys()
    config = SparseCoderConfig(
        num_latents=about.n_features, k=about.k, **{name: about.options[name] for name in of_coder}
    )
    training = TrainConfig(config, **{name: about.options[name] for name in about.options.keys() - of_coder})
    coder = SparseCoder(width, config, device=about.device, dtype=torch.float32)
    optimizer, schedule = sparsify_optimizer(about, coder)
    tokens_since_fired = torch.zeros(about.n_features, dtype=torch.long, device=about.device)
    fired = torch.zeros(about.n_features, dtype=torch.bool, device=about.device)
    torch.set_float32_matmul_precision("high")
    for step in range(about.n_steps):
        rows = next(feed)
        if step == 0:
            coder.b_dec.data = rows.mean(0)
        if config.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        dead = tokens_since_fired > training.dead_feature_threshold if training.auxk_alpha > 0 else None
        with torch.autocast(about.device, torch.bfloat16) if about.autocast else contextlib.nullcontext():
            out = coder(rows, dead_mask=dead)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + training.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        if config.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        tokens_since_fired += len(rows)
        tokens_since_fired[fired] = 0
        fired.zero_()
    feed.close_step()
    if not schedule:
        optimizer.eval()
    if about.save:
        coder.save_to_disk(about.save)

    def apply(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, features, _ = coder.encode(rows)
        return features[values != 0].bincount(minlength=about.n_features), coder.decode(values, features)

    return Fitted(apply, apply, "eai-sparsify")


def sparsify_optimizer(about: Training, coder: torch.nn.Module) -> tuple[Any, Any]:
    """Its optimizer, and the schedule of the rate if there is one."""
    if about.optimizer == "adam":
        adam = torch.optim.Adam(coder.parameters(), lr=about.lr)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: lr_share(about, step))
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    signum = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=about.lr), momentum=0.95)
    signum.train()
    return signum, None


def lr_share(about: Training, step: int) -> float:
    """The share of `lr` that SAELens' schedule gives at a step."""
    rising = (step + 1) / about.lr_warmup_steps if about.lr_warmup_steps else 1.0
    falling = (about.n_steps - step) / about.decay_steps if about.decay_steps else 1.0
    return min(1.0, rising, falling)


@torch.no_grad()
def scores(apply: Apply, held_out: np.ndarray, batch: int, device: str) -> dict[str, float]:
    """Variance unexplained (about the mean of all the rows), features per row, features that never fired."""
    torch.set_float32_matmul_precision("highest")
    mean = torch.from_numpy(held_out.mean(0, dtype=np.float64)).to(device)
    counts, error, variance = torch.zeros((), dtype=torch.long, device=device), 0.0, 0.0
    for start in range(0, len(held_out), batch):
        rows = torch.from_numpy(np.array(held_out[start : start + batch])).to(device)
        fired, reconstruction = apply(rows)
        counts = counts + fired
        error += (reconstruction.double() - rows).square().sum().item()
        variance += (rows - mean).square().sum().item()
    return {
        "variance_unexplained": error / variance,
        "l0": counts.sum().item() / len(held_out),
        "dead": int((counts == 0).sum()),
    }


def speed(seconds: list[float], batch: int) -> dict[str, float | None]:
    if not seconds:
        return {"tokens_per_s": None, "seconds_per_step": None}
    mean = sum(seconds) / len(seconds)
    return {"tokens_per_s": batch / mean, "seconds_per_step": mean}


def scored(fitted: Fitted, held_out: np.ndarray, about: Training) -> dict[str, Any]:
    found: dict[str, Any] = dict(scores(fitted.inference, held_out, about.batch, about.device))
    return found | {"as_trained": scores(fitted.as_trained, held_out, about.batch, about.device)}


def train(about: Training) -> dict[str, Any]:
    if about.threads:
        torch.set_num_threads(about.threads)
    torch.manual_seed(about.seed)
    data, held_out = (np.load(path, mmap_mode="r") for path in (about.data, about.held_out))
    feed = Feed(data, about.batch, about.seed, about.device)
    fitted = {"saelens": saelens, "sparsify": sparsify}[about.peer](about, data.shape[1], feed)
    end = None if about.n_timed is None else about.warmup_steps + about.n_timed
    timed = feed.seconds[about.warmup_steps : end]
    return {
        **speed(timed, about.batch),
        **(scored(fitted, held_out, about) if about.is_scored else {}),
        "n_steps": len(feed.seconds),
        "n_timed": len(timed),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peer_version": version(fitted.package),
    }


@torch.no_grad()
def values_of(folder: str, rows: str, out: str) -> dict[str, Any]:
    """Write `values` (n, F) and `reconstruction` (n, D) of a saved SAELens autoencoder to the .npz file `out`."""
    from sae_lens import SAE

    autoencoder = SAE.load_from_disk(folder).eval()
    values = autoencoder.encode(torch.from_numpy(np.load(rows)))
    with open(out, "wb") as file:
        np.savez(file, values=values.numpy(), reconstruction=autoencoder.decode(values).numpy())
    return {"architecture": autoencoder.cfg.architecture(), "peer_version": version("sae-lens")}


def train_or_say(about: dict[str, Any]) -> dict[str, Any]:
    try:
        return train(Training(**about))
    except Exception as error:  # one that fails must not keep the others from being trained
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    about = json.load(sys.stdin)
    if "values_of" in about:
        found: Any = values_of(about["values_of"], about["rows"], about["out"])
    elif "each" in about:
        found = [train_or_say(each) for each in about["each"]]
    elif "several" in about:
        found = [train(Training(**each)) for each in about["several"]]
    else:
        found = train(Training(**about))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
