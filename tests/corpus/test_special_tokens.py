"""Special tokens: what is stored of a text is what its tokenizer's own call gives, for eight families."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.corpus.selection import TokenSelection
from saeflow.corpus.token_parts import Frame, pack, special_tokens
from saeflow.pipeline import forecast, tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.small_pipeline import SCRIPTS, Ingredients, documents, quiet, recipe_data, write_corpus
from tests.support.tokenizers import FAMILIES, metaspace

TEXTS = {**SCRIPTS, "long": " ".join(row["text"] for row in documents()[8:16]), "one": "x", "special": "a [SEP] b"}
SPECIAL = ["bert", "roberta", "t5", "byt5", "unigram"]
"""Families whose tokenizer adds more than BOS."""
ENCODERS = ["bert", "roberta", "unigram"]


@dataclass
class Folders:
    """A folder with a tokenizer of each family, and a corpus."""

    root: Path

    def recipe(self, family: str, **changes: Any) -> Recipe:
        ingredients = Ingredients(self.root / family, self.root / "corpus.parquet")
        return parse_recipe(recipe_data(ingredients, **{"corpus": {"held_out": 0.0}} | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {family: make() for family, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any]) -> Folders:
    root = tmp_path_factory.mktemp("families")
    for family, tokenizer in made.items():
        tokenizer.save_pretrained(root / family)
    write_corpus(root / "corpus.parquet", [{"key": key, "text": text} for key, text in TEXTS.items()])
    return Folders(root)


def tokenise(store: Path, recipe: Recipe) -> Artefact:
    return tokens.run(Lineage(Store.create(store), recipe), quiet())


def columns(artefact: Artefact) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """`vocab_ids` (S, T), `owners` (S, T) with -1 at padding, and document_ids by key."""
    folder = [artefact.part_path(part) for part in artefact.published().parts]
    table = pa.concat_tables([pq.read_table(each / "tokens.parquet") for each in folder])
    rows = [row for each in folder for row in pq.read_table(each / "documents.parquet").to_pylist()]
    length = int(artefact.record.facts["context_length"])
    owners = table.column("document_id").fill_null(-1).to_numpy().reshape(-1, length)
    for row in rows:
        assert row["n_tokens"] == (owners == row["document_id"]).sum()
        if row["n_tokens"]:
            assert row["first_token_id"] == np.flatnonzero(owners.reshape(-1) == row["document_id"])[0]
    return table.column("vocab_id").to_numpy().reshape(-1, length), owners, {r["key"]: r["document_id"] for r in rows}


def own_ids(tokenizer: Any, text: str, **options: Any) -> Any:
    return tokenizer(text, split_special_tokens=True, verbose=False, **options)["input_ids"]


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_stored_as_its_tokenizer_itself_reads_it(
    tmp_path: Path, folders: Folders, made: dict[str, Any], family: str, packing: str
) -> None:
    recipe = folders.recipe(family, tokens={"context_length": 10_000, "packing": packing})
    vocab_ids, owners, by_key = columns(tokenise(tmp_path, recipe))
    for key, text in TEXTS.items():
        assert vocab_ids[owners == by_key[key]].tolist() == own_ids(made[family], text), key


@pytest.mark.parametrize("family", SPECIAL)
def test_a_long_text_in_rows_of_its_own_is_cut_as_its_tokenizer_itself_cuts_it(
    tmp_path: Path, folders: Folders, made: dict[str, Any], family: str
) -> None:
    recipe = folders.recipe(family, tokens={"context_length": 16, "packing": "isolated"})
    vocab_ids, owners, by_key = columns(tokenise(tmp_path, recipe))
    for key, text in TEXTS.items():
        mine = [row[own == by_key[key]].tolist() for row, own in zip(vocab_ids, owners, strict=True)]
        if made[family].is_fast:
            wanted = own_ids(made[family], text, truncation=True, max_length=16, return_overflowing_tokens=True)
        else:
            plain = own_ids(made[family], text, add_special_tokens=False)
            wanted = [[*plain[i : i + 15], 1] for i in range(0, max(len(plain), 1), 15)]
        assert [row for row in mine if row] == wanted, key


@pytest.mark.parametrize("family", ENCODERS)
def test_each_joined_sequence_of_an_encoder_begins_and_ends_with_its_special_tokens(
    tmp_path: Path, folders: Folders, made: dict[str, Any], family: str
) -> None:
    artefact = tokenise(tmp_path, folders.recipe(family, tokens={"context_length": 16}))
    vocab_ids, owners, by_key = columns(artefact)
    first, last = own_ids(made[family], "")
    for ids, own in zip(vocab_ids, owners, strict=True):
        real = ids[own >= 0]
        assert (real[0], real[-1]) == (first, last)
        assert (np.diff(own[own >= 0]) != 0).sum() == sum(real[:-1] == last), "one more where a document ends"
    for key, text in TEXTS.items():
        mine = vocab_ids[owners == by_key[key]]
        plain = own_ids(made[family], text, add_special_tokens=False)
        assert mine[~np.isin(mine, [first, last])].tolist() == plain
    assert (owners >= 0).mean() > 0.9
    selection = TokenSelection(artefact)
    for index in selection.parts:
        np.testing.assert_array_equal(selection.counts(index), selection.mask(index).sum(1))


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
def test_a_decoder_that_ends_texts_itself_has_both_ends(tmp_path: Path, folders: Folders, packing: str) -> None:
    made = metaspace(["<unk>", "<s>", "</s>"])
    tokenizer = transformers.LlamaTokenizer(**made, add_bos_token=True, add_eos_token=True)
    tokenizer.save_pretrained(folders.root / "ends")
    recipe = folders.recipe("ends", tokens={"context_length": 16, "packing": packing})
    vocab_ids, owners, by_key = columns(tokenise(tmp_path, recipe))
    if packing == "concatenated":
        assert vocab_ids[owners == by_key["long"]].tolist() == own_ids(tokenizer, TEXTS["long"])
        assert (owners.reshape(-1)[: (owners >= 0).sum()] >= 0).all(), "joined without padding"
    else:
        assert (vocab_ids[:, 0] == 1).all()


@pytest.mark.parametrize("family", ["gpt2", "bert", "byt5"])
def test_what_the_recipe_says_of_bos_stands_above_the_tokenizers_habit(
    tmp_path: Path, folders: Folders, made: dict[str, Any], family: str
) -> None:
    tokenizer = made[family]
    for wanted in (False, True) if tokenizer.bos_token_id is not None else (False,):
        settings = {"context_length": 10_000, "packing": "isolated", "prepend_bos": wanted}
        vocab_ids, owners, by_key = columns(tokenise(tmp_path / str(wanted), folders.recipe(family, tokens=settings)))
        for key, text in TEXTS.items():
            plain = own_ids(tokenizer, text, add_special_tokens=False)
            expected = [tokenizer.bos_token_id, *plain] if wanted else plain
            assert vocab_ids[owners == by_key[key]].tolist() == expected


def test_only_tokenizers_that_add_more_than_bos_get_another_fingerprint(tmp_path: Path, folders: Folders) -> None:
    store = Store.create(tmp_path)
    facts = {family: Lineage(store, folders.recipe(family)).token_facts for family in FAMILIES}
    assert [family for family in FAMILIES if "special_tokens" in facts[family]] == SPECIAL
    assert facts["bert"]["special_tokens"] == [["[CLS]"], ["[SEP]"]]
    assert facts["byt5"]["special_tokens"] == [[], ["</s>"]]
    said = Lineage(store, folders.recipe("bert", tokens={"prepend_bos": False})).token_facts
    assert "special_tokens" not in said
    given = Lineage(store, folders.recipe("bert", corpus={"token_ids": "ids"})).token_facts
    assert "special_tokens" not in given


def test_a_new_artefact_of_an_encoder_says_why_in_words(
    tmp_path: Path, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    store, recipe = Store.create(tmp_path), folders.recipe("bert")
    facts = Lineage(store, recipe).token_facts
    before = {name: fact for name, fact in facts.items() if name != "special_tokens"}
    store.artefact("tokens", "small", "01234567").create(before)
    tokens.run(Lineage(store, recipe), Progress())
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "because of special_tokens (the tokenizer's own, such as [CLS] and [SEP], which earlier versions left out)."
        in said
    )
    assert "set them as they were" not in said


@pytest.mark.parametrize("packing", ["isolated", "concatenated"])
@pytest.mark.parametrize("family", ["bert", "byt5"])
def test_a_forecast_counts_special_tokens(tmp_path: Path, folders: Folders, family: str, packing: str) -> None:
    for length, error in ((10_000, 0.01), (32, 0.04)):
        recipe = folders.recipe(family, tokens={"context_length": length, "packing": packing})
        counted = forecast.count_tokens(recipe, forecast.survey_corpus(recipe, quiet()))
        artefact = tokenise(tmp_path / str(length), recipe)
        assert counted == pytest.approx(artefact.published().total("n_tokens"), rel=error)


def test_a_context_without_room_for_a_text_is_refused(tmp_path: Path, folders: Folders) -> None:
    with pytest.raises(UserError, match=r"context_length is 2, but the tokenizer adds 2 special.*\nSet at least 3"):
        tokenise(tmp_path, folders.recipe("bert", tokens={"context_length": 2}))
    tokenise(tmp_path, folders.recipe("bert", tokens={"context_length": 3}))


def test_a_tokenizer_that_changes_the_text_itself_gets_no_frame() -> None:
    class Odd:
        bos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7, 9, 8] if add_special_tokens else [7, 8]}

    assert special_tokens(Odd()) == []


@settings(deadline=None)
@given(
    contents=st.lists(st.lists(st.integers(10, 19), max_size=25), max_size=12), length=st.integers(4, 12),
    before=st.lists(st.integers(1, 2), max_size=2), after=st.lists(st.integers(3, 4), max_size=1),
    packing=st.sampled_from(["concatenated", "isolated"]),
)  # fmt: skip
def test_every_stretch_of_a_document_stands_between_its_special_tokens(
    contents: list[list[int]], length: int, before: list[int], after: list[int], packing: str
) -> None:
    frame = Frame(tuple(before), tuple(after), in_each_sequence=True)
    packed = pack([(i, np.array(ids, np.int32)) for i, ids in enumerate(contents)], length, packing, 0, frame)
    found: list[list[int]] = [[] for _ in contents]
    for ids, owners in zip(packed.vocab_ids, packed.documents, strict=True):
        n_real = (owners >= 0).sum()
        assert (owners[:n_real] >= 0).all()
        assert (ids[n_real:] == 0).all()
        for owner in dict.fromkeys(owners[:n_real].tolist()):
            stretch = ids[owners == owner].tolist()
            assert stretch[: len(before)] == before
            assert stretch[len(stretch) - len(after) :] == after
            found[owner] += stretch[len(before) : len(stretch) - len(after)]
    assert found == contents
