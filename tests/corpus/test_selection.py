"""Which tokens count: positions, ranges and vocabulary entries are left out by what a recipe says."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from saeflow.corpus import token_parts
from saeflow.corpus.selection import TokenSelection
from saeflow.corpus.vocabulary import chosen_vocab_ids, write_vocab
from saeflow.pipeline import collect, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.pipeline.tokens import _special_ids
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.recipe.fingerprint import fingerprint, settings_that_count
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.small_pipeline import CONTEXT_LENGTH, END, Ingredients, quiet, recipe_data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Ingredients]:
    folder = tmp_path_factory.mktemp("selection")
    ingredients = Ingredients.write(folder)
    recipe = parse_recipe(recipe_data(ingredients, tokens={"prepend_bos": True}))
    store = Store.create(folder / "store")
    tokens.run(Lineage(store, recipe), quiet())
    return store, ingredients


@pytest.fixture(scope="module")
def source(made: tuple[Store, Ingredients]) -> Artefact:
    return made[0].artefacts("tokens")[0]


def masks(source: Artefact, **settings: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mask, the vocabulary ids and the real tokens of the first part."""
    used = TokenSelection.of(source, ActivationsConfig.model_validate(settings))
    vocab_ids, real = token_parts.read_part(source, used.parts[0])
    assert (used.counts(0) == used.mask(0).sum(1)).all()
    assert TokenSelection.from_facts(source, used.facts) == used
    return used.mask(0), vocab_ids, real


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        ([0], [0]),
        (["0-3"], [0, 1, 2, 3]),
        ("2 - 2", [2]),
        ([-1], [15]),
        ([0, "4-6", -2, 4], [0, 4, 5, 6, 14]),
        ([], []),
    ],
)
def test_any_positions_are_left_out_singly_as_ranges_or_from_the_end(source, given, positions):
    mask, _, real = masks(source, skip_positions=given)
    wanted = real.copy()
    wanted[:, positions] = False
    assert mask.tolist() == wanted.tolist()


@pytest.mark.parametrize("given", [[16], [-17], ["0-16"]])
def test_positions_outside_of_the_sequence_are_refused(source, given):
    with pytest.raises(UserError, match="sequences have the positions 0 to 15"):
        masks(source, skip_positions=given)


@pytest.mark.parametrize("given", [["3-1"], ["a"], ["-3--1"], ["0-99999999"]])
def test_what_is_no_range_is_refused(given):
    with pytest.raises(ValueError, match="skip_positions"):
        ActivationsConfig.model_validate({"skip_positions": given})


def test_special_tokens_are_left_out_all_by_name_or_by_id(source):
    pieces = pq.read_table(source.own_file("vocab.parquet")).column("piece").to_pylist()
    end = pieces.index(END)
    dots = [number for number, piece in enumerate(pieces) if piece == "."]
    for given, left_out in [
        (True, [end]), ([END], [end]), (END, [end]), ([end], [end]), ([".", end], [*dots, end]), (False, []), ([], []),
    ]:  # fmt: skip
        mask, vocab_ids, real = masks(source, skip_special=given)
        assert mask.tolist() == (real & ~np.isin(vocab_ids, left_out)).tolist(), given
        assert real.sum() > mask.sum() or not left_out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["<|endoftxt|>"], r"names '<\|endoftxt\|>', but no vocabulary entry is called so. Did you mean <\|endof"),
        (["§§§§§§"], r"'§§§§§§', but no vocabulary entry is called so. There are: <\|endoftext\|>\."),
        ([400], "skip_special names the id 400; the vocabulary has the ids 0 to 399"),
    ],
)  # fmt: skip
def test_an_entry_that_there_is_not_is_refused_before_any_work(made, tmp_path, given, said):
    store, ingredients = made
    recipe = parse_recipe(recipe_data(ingredients, tokens={"prepend_bos": True}, activations={"skip_special": given}))
    with pytest.raises(UserError, match=said):
        collect.run(Lineage(store, recipe), quiet())
    fresh = Lineage(Store.create(tmp_path / "store"), recipe)
    with pytest.raises(UserError, match=said):
        tokens.run(fresh, quiet())
    assert not fresh.tokens.exists()


def test_a_position_that_there_is_not_is_refused_before_any_work(made, tmp_path):
    recipe = parse_recipe(recipe_data(made[1], activations={"skip_positions": [CONTEXT_LENGTH]}))
    fresh = Lineage(Store.create(tmp_path / "store"), recipe)
    with pytest.raises(UserError, match=r"skip_positions is \[16\]; sequences have the positions 0 to 15"):
        tokens.run(fresh, quiet())
    assert not fresh.tokens.exists()


@pytest.mark.parametrize("given", [[True], [-1], [1.5], 2, 0.5, {"a": 1}])
def test_what_names_no_entries_is_refused_in_one_sentence(ingredients, given):
    with pytest.raises(UserError) as refused:
        parse_recipe(recipe_data(ingredients, activations={"skip_special": given}))
    assert "It must be true, false, or a list of names and ids".lower() in str(refused.value).lower()
    assert str(refused.value).count("skip_special is") == 1


def test_earlier_recipes_mean_what_they_meant():
    for old in (True, 1, "true", "on"):
        assert ActivationsConfig.model_validate({"skip_special": old}).skip_special is True
    plain = ActivationsConfig(sites=["x"])
    assert "skip_special" not in settings_that_count(plain)
    ranged = ActivationsConfig.model_validate({"sites": ["x"], "skip_positions": ["0-2"]})
    assert fingerprint(ranged) == fingerprint(ActivationsConfig(sites=["x"], skip_positions=[0, 1, 2]))


def test_a_name_and_its_id_are_one_choice(source):
    by_name = TokenSelection.of(source, ActivationsConfig(skip_special=[END]))
    number = int(by_name.special[0])
    assert by_name.facts == TokenSelection.of(source, ActivationsConfig(skip_special=[number])).facts
    assert by_name.facts == {"skip_special": [number]}


def test_an_entry_marked_as_special_without_a_role_is_special(tmp_path, ingredients):
    tokenizer = AutoTokenizer.from_pretrained(ingredients.model)
    tokenizer.add_tokens([AddedToken("<|start_header_id|>", special=True), AddedToken("plain", special=False)])
    names = {tokenizer.convert_ids_to_tokens(number) for number in _special_ids(tokenizer)}
    assert names == {END, "<|start_header_id|>"}


def test_equal_pieces_are_left_out_together(tmp_path):
    write_vocab(tmp_path / "vocab.parquet", ["a", "b", "a"])
    assert chosen_vocab_ids(tmp_path / "vocab.parquet", ["a", 1]).tolist() == [0, 1, 2]
