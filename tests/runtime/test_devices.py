"""A GPU gives what the processor gives; its copies overlap with its work and are whole when they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.stages import run
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.devices import GPU_WORKERS, choose_device, own_stream, to_device, to_processor
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.runtime.threads import map_in_order
from saeflow.store.store import Store
from tests.support.small_pipeline import Ingredients, recipe_data

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_what_comes_back_is_what_was_sent_from_every_thread(place: str) -> None:
    def there_and_back(seed: int) -> torch.Tensor:
        values = torch.arange(1 << 18).view(4, -1) + seed
        with own_stream(torch.device(place)):
            return to_processor(to_device(values, torch.device(place)) * 2)

    for seed, found in enumerate(map_in_order(there_and_back, range(24), GPU_WORKERS)):
        assert found.device.type == "cpu"
        assert torch.equal(found, (torch.arange(1 << 18).view(4, -1) + seed) * 2)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "mps", ""])
def test_a_device_that_is_not_there_is_refused_with_the_ones_that_may_be_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"train\.device is '{name}', but .*\"auto\".*\"cpu\""):
        choose_device("train.device", name)
    assert choose_device("train.device", "cpu").type == "cpu"
    assert choose_device("train.device", "auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@on_gpu
@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
def test_a_gpu_stores_what_the_processor_stores(
    ingredients: Ingredients, tmp_path: Path, progress: Progress, packing: str
) -> None:
    found = {}
    for place in ("cpu", "cuda"):
        changes = {"tokens": {"packing": packing}, "activations": {"dtype": "float32"}}
        recipe = parse_recipe(
            recipe_data(ingredients, model={"path": str(ingredients.model), "device": place}, **changes)
        )
        store = Store.create(tmp_path / place)
        tokens.run(Lineage(store, recipe), progress)
        stored = collect.run(Lineage(store, recipe), progress)
        site = stored_sites(stored)[0]
        parts = stored.published().parts
        found[place] = torch.cat([shards.open_site(stored, part, site).read(slice(None)).flatten(1) for part in parts])
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_with_the_model_on_a_gpu_ends_with_its_quality(
    ingredients: Ingredients, tmp_path: Path, dtype: str
) -> None:
    about = {"path": str(ingredients.model), "device": "cuda", "dtype": dtype}
    quality = run(
        Lineage(Store.create(tmp_path / "store"), parse_recipe(recipe_data(ingredients, model=about))), Progress()
    )
    assert quality["quality"]["n_predicted"] > 0
