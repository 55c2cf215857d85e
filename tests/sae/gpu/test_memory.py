"""The formula for the memory of a step is an upper bound, and not far from what the step holds."""

import pytest
import torch

pytest.importorskip("triton")

from saeflow.recipe.settings import SAEConfig, TrainConfig
from saeflow.sae.gpu.memory import TrainingSize
from tests.sae.gpu.trace import ARCHITECTURES, REAL, Sizes, a_step, trace_of

OTHERS = (Sizes(4096, 16_384, 768, 32), Sizes(8192, 4096, 500, 32))


def size_of(sizes: Sizes, name: str, dtype: torch.dtype, n_dead: int, **ranks: int) -> TrainingSize:
    nested = SAEConfig.model_validate({"architecture": name, "n_features": sizes.n_features, "k": sizes.k}).nested
    n_features = sizes.n_features // ranks.get("n_feature_ranks", 1)
    numbers = sizes.n_rows, n_features, sizes.width, sizes.width, sizes.k, len(nested)
    return TrainingSize(*numbers, name == "topk", False, dtype, n_dead, **ranks)


@pytest.mark.parametrize("sizes", [*REAL, *OTHERS])
@pytest.mark.parametrize("share_dead", [0.0, 0.0005, 0.05, 0.6])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_holds_no_more_than_the_formula_says_and_little_less(name, share_dead, sizes):
    for dtype in (torch.bfloat16, torch.float32):
        trace = trace_of(sizes, dtype, share_dead=share_dead, architecture=name)
        said = size_of(sizes, name, dtype, int(share_dead * sizes.n_features)).step_bytes
        assert trace.peak <= said <= 1.3 * trace.peak


@pytest.mark.parametrize("sizes", [*REAL, OTHERS[0]])
@pytest.mark.parametrize(("n_ranks", "share_dead"), [(2, 0.0), (3, 0.05), (8, 0.6)])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("what", ["rows", "features"])
def test_so_it_is_with_several_ranks(what, name, n_ranks, share_dead, sizes):
    trace = trace_of(sizes, share_dead=share_dead, n_ranks=n_ranks, what=what, architecture=name)
    ranks = {"n_ranks" if what == "rows" else "n_feature_ranks": n_ranks}
    said = size_of(sizes, name, torch.bfloat16, int(share_dead * sizes.n_features), **ranks).step_bytes
    assert trace.peak <= said <= 1.3 * trace.peak


@pytest.mark.parametrize("sizes", [*REAL, *OTHERS])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_state_takes_what_the_formula_says(weights, moments, sizes):
    train = TrainConfig(weights=weights, moments=moments)
    step = a_step(sizes, train=train)
    tensors = [
        *step.sae.parameters(),
        *step.sae.buffers(),
        *(each for one in step.moments.values() for each in one.values()),
    ]
    held = sum(each.nbytes for each in tensors)
    held += 0 if step.w_low.shape == step.sae.W_enc.shape and weights == "bfloat16" else step.w_low.nbytes
    sae = SAEConfig.model_validate({"architecture": "topk", "n_features": sizes.n_features, "k": sizes.k})
    said = TrainingSize.of(sae, train, (sizes.width, sizes.width), sizes.n_rows).state_bytes
    assert held <= said <= 1.05 * held
