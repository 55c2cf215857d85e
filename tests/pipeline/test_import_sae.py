"""An autoencoder of another program in a store: imported, encoded, judged and asked like one trained here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeflow.activations import shards
from saeflow.activations.shards import stored_sites
from saeflow.corpus import token_parts
from saeflow.model.sites import choose_site
from saeflow.pipeline import collect, encode, forecast, stages, tokens, train
from saeflow.pipeline.judge import evaluate
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lineage import Lineage, last_log_row
from saeflow.query.ask import ask
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import Recipe, load_recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.load import load_sae
from saeflow.sae.formats.source import effective_config
from saeflow.store.files import read_json
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import Command
from tests.support.sae_folders import write_saelens
from tests.support.small_pipeline import SITE, WIDTH, Ingredients, quiet, recipe_data, tree, write_recipe

F = 48


def foreign_tensors(n: int = F, out: int = WIDTH) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(1)
    return {
        "W_enc": torch.randn(WIDTH, n, generator=dice),
        "b_enc": torch.randn(n, generator=dice) / 4,
        "W_dec": torch.randn(n, out, generator=dice) / 8,
        "b_dec": torch.randn(out, generator=dice) / 4,
        "threshold": torch.linspace(0.2, 1.5, n),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An SAE that SAELens wrote, for the site of the small recipe."""
    about = {"metadata": {"model_name": "gpt2", "hook_name": "blocks.0"}, "apply_b_dec_to_input": False}
    return write_saelens(tmp_path / "theirs", "jumprelu", foreign_tensors(), **about)


@pytest.fixture
def store(finished: Finished, tmp_path: Path) -> Store:
    shutil.copytree(finished.store.root, tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def recipe_of(ingredients: Ingredients, folder: Path, **sae: Any) -> Recipe:
    """The small recipe's activations, through another SAE."""
    about = {"source": str(folder), "n_features": F} | sae
    return parse_recipe(recipe_data(ingredients, name="foreign", data="small", sae=about))


def wanted_values(store: Store, recipe: Recipe) -> dict[tuple[int, int], float]:
    """The formula in float64 on every stored activation, by (token_id, feature_id)."""
    p = {name: tensor.double() for name, tensor in foreign_tensors().items()}
    stored, source = Lineage(store, recipe).activations, Lineage(store, recipe).tokens
    site, found = choose_site(stored_sites(stored), SITE), {}
    for token_part, part in zip(source.published().parts, stored.published().parts, strict=True):
        mask = token_parts.read_part(source, token_part)[1]
        x = shards.open_site(stored, part, site).read(slice(None)).double()
        pre = x @ p["W_enc"] + p["b_enc"]
        values = torch.where((pre > p["threshold"]) & torch.from_numpy(mask)[:, :, None], pre, 0)
        first = part.counts["first_sequence"]
        for sequence, position, feature in values.nonzero().tolist():
            token = (first + sequence) * mask.shape[1] + position
            found[token, feature] = values[sequence, position, feature].item()
    return found


@pytest.mark.long
def test_an_imported_autoencoder_is_encoded_judged_and_asked(
    store: Store, folder: Path, ingredients: Ingredients, tmp_path: Path, saeflow: Command
) -> None:
    path = write_recipe(
        tmp_path / "my.toml", recipe_data(ingredients, name="foreign", data="small", sae={"n_features": F})
    )
    said = saeflow("import", str(folder), str(path), "--store", str(store.root))
    assert said.code == 0, said.err
    assert f"SAELens: jumprelu, {WIDTH} neurons, {F} features, thresholds 0.2 to 1.5" in said.out
    assert f'source = "{folder}"' in said.out
    assert f"Next: saeflow encode {path} --store {store.root}" in said.out
    assert "L0" in said.out

    recipe = recipe_of(ingredients, folder)
    for stage in stages.stages_of(recipe).values():
        stage(Lineage(store, recipe), quiet())
    wanted = wanted_values(store, recipe)
    with connect(store, Lineage(store, recipe).features.id) as connection:
        rows = connection.execute("select token_id, feature_id, value from stg_feature_major").fetchall()
        assert {(token, feature) for token, feature, _ in rows} == wanted.keys()
        got = np.array([value for *_, value in rows])
        np.testing.assert_allclose(got, [wanted[token, feature] for token, feature, _ in rows], rtol=2.0**-11 + 1e-5)
        feature = rows[0][1]
        asked = ask(connection, "tokens_where", [str(feature), "1.0"])
        assert asked.num_rows == sum(value > 1.0 for _, each, value in rows if each == feature) > 0
        assert [name for name, found in check(connection) if len(found)] == []
        about = connection.execute("select architecture, n_features, k from runs where is_current").fetchone()
    assert about == ("jumprelu", F, None)
    made = Lineage(store, recipe).sae
    l0 = last_log_row(made)["l0"]
    assert l0 == pytest.approx(len(wanted) / len({token for token, _ in wanted}), rel=0.2)
    quality = read_json(Lineage(store, recipe).features.path / "quality.json")
    assert 0 < quality["variance_unexplained"] == pytest.approx(last_log_row(made)["variance_unexplained"], rel=0.2)


def test_an_import_is_published_as_our_own_and_says_where_it_is_from(
    store: Store, folder: Path, ingredients: Ingredients
) -> None:
    recipe = recipe_of(ingredients, folder, site=SITE)
    made = train.run(Lineage(store, recipe), quiet())
    loaded, theirs = load_sae(made.path), load_sae(folder)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert (loaded.config.site, loaded.config.source, loaded.config.n_features) == (SITE, None, F)
    cfg = read_json(made.path / "cfg.json")
    assert cfg["metadata"]["model_name"] == "gpt2"
    assert cfg["metadata"]["site"] == SITE
    assert read_json(made.path / "provenance.json")["source"] == str(folder)
    assert pq.read_table(made.path / "log.parquet").num_rows == 1
    before = tree(made.path)
    assert train.run(Lineage(store, recipe, fresh=True), quiet()) == made
    (made.path / "log.parquet").unlink()
    train.run(Lineage(store, recipe), quiet())
    assert tree(made.path) == before, "the same import twice gives the same bytes"


def test_an_import_is_named_by_what_the_folder_holds(store: Store, folder: Path, ingredients: Ingredients) -> None:
    recipe = recipe_of(ingredients, folder)
    fp = Lineage(store, recipe).sae.fp
    moved = folder.rename(folder.with_name("moved"))
    recipe = recipe_of(ingredients, moved)
    assert Lineage(store, recipe).sae.fp == fp
    slower = recipe.model_copy(update={"train": recipe.train.model_copy(update={"lr": 1.0})})
    assert Lineage(store, slower).sae.fp == fp, "it is not trained"
    tensors = load_file(moved / "sae_weights.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] + 1}, moved / "sae_weights.safetensors")
    assert Lineage(store, recipe).sae.fp != fp


def test_one_of_our_own_is_imported_into_another_name_with_the_same_values(
    finished: Finished, store: Store, ingredients: Ingredients
) -> None:
    own = Lineage(finished.store, finished.recipe).sae.path
    recipe = parse_recipe(recipe_data(ingredients, name="again", data="small", sae={"source": str(own)}))
    for stage in (train.run, encode.run, evaluate.run):
        stage(Lineage(store, recipe), quiet())
    first, again = (Lineage(s, r).features.path for s, r in ((finished.store, finished.recipe), (store, recipe)))

    def tables(path: Path) -> list[bytes]:
        return [file.read_bytes() for file in sorted(path.glob("parts/*/*_major/*/*/*.parquet"))]

    assert tables(first) == tables(again) != []
    assert load_sae(Lineage(store, recipe).sae.path).config == load_sae(own).config


@pytest.mark.parametrize(
    ("sae", "reason"),
    [
        (
            {"n_features": 64},
            rf"sae\.n_features is 64, but the SAE in .* has {F}\.\nSet sae\.n_features to {F}, or leave",
        ),
        ({"target_site": SITE}, r"is no transcoder, but sae\.target_site is .*\nLeave it out"),
        ({"source": "/nowhere"}, r"sae\.source is /nowhere, but there is no such folder\.\nName the folder"),
    ],
)
def test_a_recipe_that_contradicts_the_folder_is_refused_before_work(
    store: Store, folder: Path, ingredients: Ingredients, sae: dict[str, Any], reason: str
) -> None:
    recipe, before = recipe_of(ingredients, folder, **sae), tree(store.root)
    with pytest.raises(UserError, match=reason):
        train.run(Lineage(store, recipe), quiet())
    assert tree(store.root) == before


def test_a_k_that_is_not_the_folders_is_refused(store: Store, tmp_path: Path, ingredients: Ingredients) -> None:
    tensors = {name: tensor for name, tensor in foreign_tensors().items() if name != "threshold"}
    folder = write_saelens(tmp_path / "topk", "topk", tensors, k=7)
    with pytest.raises(UserError, match=r"sae\.k is 4, but the SAE in .* has 7"):
        train.run(Lineage(store, recipe_of(ingredients, folder)), quiet())
    made = train.run(Lineage(store, recipe_of(ingredients, folder, k=7)), quiet())
    assert last_log_row(made)["l0"] == 7


def test_vectors_of_another_width_are_refused_with_the_sites_that_fit(
    store: Store, tmp_path: Path, ingredients: Ingredients
) -> None:
    tensors = foreign_tensors()
    tensors |= {"W_enc": tensors["W_enc"][:20], "W_dec": tensors["W_dec"][:, :20], "b_dec": tensors["b_dec"][:20]}
    folder = write_saelens(tmp_path / "narrow", "jumprelu", {n: t.contiguous() for n, t in tensors.items()})
    before = tree(store.root)
    with pytest.raises(
        UserError, match=rf"has vectors of 20, but those of site {SITE} are of {WIDTH}\.\nStore the site"
    ):
        train.run(Lineage(store, recipe_of(ingredients, folder)), quiet())
    assert tree(store.root) == before


def test_activations_come_before_an_import(tmp_path: Path, folder: Path, ingredients: Ingredients) -> None:
    with pytest.raises(UserError, match=r"activations/small-\w+ is not finished"):
        train.run(Lineage(Store.create(str(tmp_path / "empty")), recipe_of(ingredients, folder)), quiet())


def test_a_transcoder_is_imported_onto_two_sites(tmp_path: Path, ingredients: Ingredients) -> None:
    wide, target = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp"
    about = {"apply_b_dec_to_input": False, "d_out": 16}
    folder = write_saelens(tmp_path / "theirs", "jumprelu_transcoder", foreign_tensors(out=16), **about)
    sae = {"source": str(folder), "n_features": F, "site": SITE}
    data = recipe_data(ingredients, name="foreign", sae=sae, activations={"sites": [SITE, wide, target]})
    recipe, store = parse_recipe(data), Store.create(str(tmp_path / "store"))
    for stage in (tokens.run, collect.run):
        stage(Lineage(store, recipe), quiet())
    with pytest.raises(UserError, match=r"is a transcoder, but sae\.target_site is None\.\nSet it to the site"):
        train.run(Lineage(store, recipe), quiet())
    to_wide = parse_recipe(data | {"sae": data["sae"] | {"target_site": wide}})
    with pytest.raises(UserError, match=rf"has vectors of 16, but .* of {WIDTH}\.\nSet sae\.target_site to {target}"):
        train.run(Lineage(store, to_wide), quiet())
    recipe = parse_recipe(data | {"sae": data["sae"] | {"target_site": target}})
    for stage in (train.run, encode.run, evaluate.run):
        stage(Lineage(store, recipe), quiet())
    wanted, made = wanted_values(store, recipe), Lineage(store, recipe).features
    assert made.published().total("n_values") == len(wanted)
    assert load_sae(Lineage(store, recipe).sae.path).config.target_site == target


def test_an_imported_autoencoder_has_seen_none_of_the_documents(
    store: Store, folder: Path, ingredients: Ingredients
) -> None:
    made = train.run(Lineage(store, recipe_of(ingredients, folder)), quiet())
    done = forget.forget(store, ["tales/000"], quiet())
    assert made.id not in [*done.saes, *done.held_out_only]
    assert any(sae.startswith("saes/small") for sae in [*done.saes, *done.held_out_only])


def test_another_architecture_than_the_folders_is_refused(folder: Path, ingredients: Ingredients) -> None:
    asked = {"source": str(folder), "n_features": F, "architecture": "gated"}
    with pytest.raises(
        UserError, match=r"sae.architecture is gated, but the SAE in .* has jumprelu\.\nSet .* leave it out"
    ):
        effective_config(parse_recipe(recipe_data(ingredients, sae=asked)).sae)


def test_a_member_of_a_sweep_may_be_imported(store: Store, folder: Path, ingredients: Ingredients) -> None:
    each = [{"sae": {"source": str(folder), "n_features": F}}, {"sae": {"k": 3}}]
    recipe = parse_recipe(recipe_data(ingredients) | {"sweep": {"each": each}})
    taken, trained = train.run_all(Lineage(store, recipe), quiet())
    assert ("imported" in taken.record.facts, "imported" in trained.record.facts) == (True, False)


@pytest.mark.long
def test_a_plan_forecasts_an_import(store: Store, folder: Path, ingredients: Ingredients) -> None:
    found = forecast.plan(store, recipe_of(ingredients, folder), quiet())
    assert [stage.name for stage in found.stages][2] == "train"
    (encode,) = (stage.n_bytes for stage in found.stages if stage.name == "encode")
    assert encode > 0


@pytest.mark.parametrize(
    "huge",
    [
        {"W_enc": torch.full((WIDTH, F), 1e30), "b_dec": torch.full((WIDTH,), 1e30)},
        {"W_enc": torch.full((WIDTH, F), 1e38)},
        {"W_enc": torch.full((WIDTH, F), 1e20), "W_dec": torch.full((F, WIDTH), 1e30)},
        {"W_dec": torch.full((F, WIDTH), float("inf"))},
    ],
    ids=["biases overflow when folded", "values overflow", "reconstructions overflow", "infinite"],
)
def test_an_sae_that_overflows_is_refused_before_it_is_published(
    finished: Finished, ingredients: Ingredients, tmp_path: Path, huge: dict[str, torch.Tensor]
) -> None:
    folder = write_saelens(tmp_path / "huge", "jumprelu", foreign_tensors() | huge, apply_b_dec_to_input=False)
    store = Store.open(str(shutil.copytree(finished.store.root, tmp_path / "store")))
    before = tree(store.root / "saes")
    with pytest.raises(UserError, match="NaN or infinite"):
        train.run(Lineage(store, recipe_of(ingredients, folder)), quiet())
    assert tree(store.root / "saes") == before


RESIDUAL = "transformer.h.0"


def residual_sae(folder: Path, **metadata: Any) -> Path:
    """A sound SAE of the residual stream, 16 wide: a rotation, so that it explains nearly everything."""
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    both = torch.cat([rotation, -rotation], dim=1)
    tensors = {"W_enc": both, "W_dec": both.t().contiguous(), "b_enc": torch.zeros(32), "b_dec": torch.zeros(16)}
    return write_saelens(folder, "standard", tensors, apply_b_dec_to_input=False, metadata=metadata)


def test_a_recipe_without_sites_takes_those_that_its_sae_names(tmp_path: Path, ingredients: Ingredients) -> None:
    folder = residual_sae(tmp_path / "theirs", hook_name="blocks.0.hook_resid_post")
    data = recipe_data(ingredients, name="foreign", activations={"sites": []})
    recipe, store = parse_recipe(data | {"sae": {"source": str(folder)}}), Store.create(str(tmp_path / "store"))
    for stage in (tokens.run, collect.run, train.run, encode.run, evaluate.run):
        stage(Lineage(store, recipe), quiet())
    lineage = Lineage(store, recipe)
    assert [site.name for site in lineage.stored_sites] == [RESIDUAL]
    assert lineage.site.name == RESIDUAL
    assert last_log_row(lineage.sae)["variance_unexplained"] < 0.01
    check = read_json(lineage.sae.path / "provenance.json")["check"]
    assert check["looks_like"] == []
    assert 0 <= check["silent"] < 1
    written = data["activations"] | {"sites": ["blocks.0.hook_resid_post"]}
    named = parse_recipe(data | {"sae": {"source": str(folder)}, "activations": written})
    assert Lineage(store, named).activations.fp == lineage.activations.fp


def test_an_sae_that_names_no_place_needs_activations_sites(tmp_path: Path, ingredients: Ingredients) -> None:
    folder = residual_sae(tmp_path / "theirs")
    data = recipe_data(ingredients, name="foreign", activations={"sites": []}) | {"sae": {"source": str(folder)}}
    with pytest.raises(UserError, match=r"activations\.sites is empty, and the SAE in .* does not say where"):
        Lineage(Store.create(str(tmp_path / "store")), parse_recipe(data))
    with pytest.raises(UserError, match=r"activations\.sites is empty\. Name the modules"):
        parse_recipe(data | {"sae": {}})


def test_the_site_that_an_sae_names_is_chosen_among_several_and_another_one_is_said(
    tmp_path: Path, ingredients: Ingredients, saeflow: Command
) -> None:
    folder = residual_sae(tmp_path / "theirs", hook_name="blocks.0.hook_resid_post", l0=3.0)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"W_enc": tensors["W_enc"] / 40, "b_dec": torch.ones(16)}, folder / "sae_weights.safetensors")
    sites = [RESIDUAL, "transformer.h.1"]
    data = recipe_data(ingredients, name="foreign", activations={"sites": sites}, sae={"source": str(folder)})
    data["sae"] = {"source": str(folder)}
    recipe, store = parse_recipe(data), Store.create(str(tmp_path / "store"))
    for stage in (tokens.run, collect.run):
        stage(Lineage(store, recipe), quiet())
    assert Lineage(store, recipe).site.name == RESIDUAL
    data["sae"]["site"] = sites[1]
    said = saeflow("import", str(folder), str(write_recipe(tmp_path / "my.toml", data)), "--store", str(store.root))
    assert said.code == 0, said.err
    assert "it was trained on blocks.0.hook_resid_post, but sae.site is transformer.h.1" in said.err + said.out
    assert "it says 3" in said.out
    assert "of the variance unexplained" in said.out


def test_a_transcoder_finds_both_of_its_sites(tmp_path: Path, ingredients: Ingredients) -> None:
    about = {
        "apply_b_dec_to_input": False,
        "d_out": 16,
        "metadata": {"hook_name": "blocks.0.mlp.hook_post", "hook_name_out": "blocks.0.hook_mlp_out"},
    }
    skip = {"W_skip": torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(3))}
    folder = write_saelens(tmp_path / "skips", "jumprelu_skip_transcoder", foreign_tensors(out=16) | skip, **about)
    data = recipe_data(ingredients, name="foreign", activations={"sites": []}) | {"sae": {"source": str(folder)}}
    recipe, store = parse_recipe(data), Store.create(str(tmp_path / "store"))
    for stage in (tokens.run, collect.run, train.run, encode.run, evaluate.run):
        stage(Lineage(store, recipe), quiet())
    lineage = Lineage(store, recipe)
    assert [site.name for site in lineage.sites] == ["transformer.h.0.mlp.c_proj:input", "transformer.h.0.mlp"]
    loaded = load_sae(lineage.sae.path)
    assert loaded.W_skip is not None
    assert torch.equal(loaded.W_skip, skip["W_skip"])
    quality = read_json(lineage.features.path / "quality.json")
    log = last_log_row(lineage.sae)
    assert quality["variance_unexplained"] == pytest.approx(log["variance_unexplained"], rel=0.3)


def test_a_threshold_that_was_folded_twice_is_named_when_the_sae_comes_in(
    tmp_path: Path, ingredients: Ingredients, saeflow: Command
) -> None:
    """SAELens folded the decoder's lengths into the threshold of a BatchTopK that already had its units."""
    folder = residual_sae(tmp_path / "theirs", hook_name="blocks.0.hook_resid_post")
    tensors = load_file(folder / "sae_weights.safetensors")
    for spoilt in (False, True):
        threshold = 0.02 * (torch.logspace(-3, 3, 32) if spoilt else torch.ones(32))
        write_saelens(folder, "jumprelu", tensors | {"threshold": threshold}, apply_b_dec_to_input=False)
        data = recipe_data(ingredients, name="foreign", activations={"sites": [RESIDUAL]})
        recipe = write_recipe(tmp_path / "my.toml", data | {"sae": {"source": str(folder)}})
        store = Store.create(str(tmp_path / "store"))
        for stage in (tokens.run, collect.run):
            stage(Lineage(store, load_recipe(recipe)), quiet())
        said = saeflow("import", str(folder), str(recipe), "--store", str(store.root))
        assert said.code == 0, said.err
        assert ("folded into the thresholds twice" in said.out) == spoilt, said.out
        shown = saeflow("show", "foreign", "--store", str(store.root))
        assert ("folded into the thresholds twice" in " ".join(shown.out.split())) == spoilt, shown.out
