"""Documents to sequences: nothing lost, nothing cut, everything findable again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeflow.corpus.document import is_held_out
from saeflow.corpus.token_parts import frame_of, pack
from saeflow.model.load import load_tokenizer
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import CorpusConfig, TokensConfig
from saeflow.recipe.recipe import parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from tests.support.small_pipeline import CONTEXT_LENGTH, SCRIPTS, documents, recipe_data, tree, write_corpus

PAD = 7
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=25), max_size=12)


@dataclass
class Tokenised:
    """An artefact with its tables read back, parts end to end."""

    artefact: Artefact
    tokens: pa.Table
    documents: list[dict[str, object]]

    @classmethod
    def read(cls, artefact: Artefact) -> Tokenised:
        parts = artefact.published().parts
        folders = [artefact.part_path(part) for part in parts]
        both = [pq.read_table(folder / "tokens.parquet") for folder in folders]
        rows = [row for folder in folders for row in pq.read_table(folder / "documents.parquet").to_pylist()]
        return cls(artefact, pa.concat_tables(both), rows)

    def column(self, name: str) -> np.ndarray:
        return self.tokens.column(name).to_numpy(zero_copy_only=False)

    def text(self, tokenizer, row) -> str:
        """A document's text out of its rows of the table."""
        mine = self.column("document_id") == row["document_id"]
        return str(tokenizer.decode(self.column("vocab_id")[mine]))


def tokenise(tmp_path, ingredients, progress, **changes) -> Tokenised:
    recipe = parse_recipe(recipe_data(ingredients, **changes))
    return Tokenised.read(tokens.run(Lineage(Store.create(tmp_path / "store"), recipe), progress))


@pytest.fixture(scope="module")
def tokenised(finished) -> Tokenised:
    return Tokenised.read(Lineage(finished.store, finished.recipe).tokens)


@pytest.fixture(scope="module")
def tokenizer(finished):
    return load_tokenizer(finished.recipe.model)


@settings(deadline=None)
@given(contents=DOCUMENTS, length=st.integers(1, 10), packing=st.sampled_from(["concatenated", "isolated"]))
def test_packing_keeps_every_token_of_every_document_once_and_in_order(contents, length, packing):
    given_documents = [(100 + i, np.array(ids, np.int32)) for i, ids in enumerate(contents)]
    packed = pack(given_documents, length, packing, PAD)
    assert packed.vocab_ids.shape == packed.documents.shape
    assert packed.vocab_ids.shape[1] == length
    for owner, ids in given_documents:
        np.testing.assert_array_equal(packed.vocab_ids[packed.documents == owner], ids)
    assert (packed.documents >= 0).sum() == sum(map(len, contents))
    padding = packed.documents < 0
    assert (packed.vocab_ids[padding] == PAD).all()
    assert (padding[:, :-1] <= padding[:, 1:]).all()  # only at the end of rows
    assert not padding[:, :1].any()  # no empty rows
    if packing == "concatenated":
        assert not padding[:-1].any()  # only in the last row
    else:
        owners = [set(row[row >= 0].tolist()) for row in packed.documents]
        assert all(len(names) == 1 for names in owners)


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
def test_nothing_and_only_empty_documents_pack_to_no_rows(packing):
    for nothing in ([], [(0, np.array([], np.int32))]):
        assert pack(nothing, 4, packing, PAD).vocab_ids.shape == (0, 4)


def test_token_ids_are_dense_and_sorted_and_positions_count_inside_the_sequence(tokenised):
    token_ids = tokenised.column("token_id")
    np.testing.assert_array_equal(token_ids, np.arange(len(token_ids)))
    np.testing.assert_array_equal(tokenised.column("position"), token_ids % CONTEXT_LENGTH)


def test_the_table_has_the_types_that_the_disk_contract_names(tokenised):
    kinds = {field.name: str(field.type) for field in tokenised.tokens.schema}
    assert kinds == {
        "token_id": "int64", "vocab_id": "int32", "document_id": "int64", "position": "int32", "mask": "bool",
            "char_start": "int32", "char_end": "int32", "role": "string", "turn": "int32", "assistant": "bool",
    }  # fmt: skip


def test_padding_has_no_document_and_no_mask(tokenised):
    owned = np.array(tokenised.tokens.column("document_id").is_valid())
    np.testing.assert_array_equal(owned, tokenised.column("mask"))
    assert owned.sum() == sum(part.counts["n_tokens"] for part in tokenised.artefact.published().parts)


def test_parts_hold_whole_documents_that_start_where_the_last_part_ended(tokenised):
    parts = tokenised.artefact.published().parts
    assert len(parts) > 3
    n_sequences = n_documents = 0
    for part in parts:
        assert part.counts["first_sequence"] == n_sequences
        assert part.counts["first_document"] == n_documents
        n_sequences += part.counts["n_sequences"]
        n_documents += part.counts["n_documents"]
        table = pq.read_table(tokenised.artefact.part_path(part) / "tokens.parquet")
        own = pq.read_table(tokenised.artefact.part_path(part) / "documents.parquet")
        assert table.num_rows == part.counts["n_sequences"] * CONTEXT_LENGTH
        assert set(table.column("document_id").drop_null().to_pylist()) <= set(own.column("document_id").to_pylist())
    assert n_documents == len(documents())


def test_the_documents_table_says_where_each_document_is(tokenised, tokenizer):
    owners, token_ids = tokenised.column("document_id"), tokenised.column("token_id")
    by_key = {row["key"]: row for row in documents()}
    assert [row["key"] for row in tokenised.documents] == sorted(by_key)
    for number, row in enumerate(tokenised.documents):
        mine = token_ids[owners == number]
        assert row["document_id"] == number
        assert row["n_tokens"] == len(mine) == len(tokenizer(by_key[row["key"]]["text"])["input_ids"])
        assert row["first_token_id"] == (mine[0] if len(mine) else None)
        np.testing.assert_array_equal(mine, np.arange(len(mine)) + (mine[0] if len(mine) else 0))
        assert (row["source"], row["title"]) == (by_key[row["key"]]["source"], by_key[row["key"]]["title"])


def test_held_out_documents_have_sequences_of_their_own_at_the_end_of_each_part(tokenised, finished):
    about = finished.recipe.corpus
    held = {row["document_id"] for row in tokenised.documents if row["held_out"]}
    wanted = {row["document_id"] for row in tokenised.documents if is_held_out(row["key"], about.seed, about.held_out)}
    assert held == wanted
    assert len(held) > 5
    for part in tokenised.artefact.published().parts:
        table = pq.read_table(tokenised.artefact.part_path(part) / "tokens.parquet")
        owners = np.array(table.column("document_id").fill_null(-1)).reshape(-1, CONTEXT_LENGTH)
        is_held = np.isin(owners, list(held))
        assert not is_held[: part.counts["n_train_sequences"]].any()
        assert (is_held | (owners < 0))[part.counts["n_train_sequences"] :].all()
        assert part.counts["n_train_tokens"] == (owners[: part.counts["n_train_sequences"]] >= 0).sum()


@pytest.mark.parametrize("packing", ["concatenated", "isolated"])
@pytest.mark.parametrize("bos", [False, True])
def test_every_text_comes_back_in_both_packings_with_and_without_bos(
    tmp_path, ingredients, tokenizer, progress, packing, bos
):
    changes = {"packing": packing, "prepend_bos": bos}
    made = tokenise(tmp_path, ingredients, progress, tokens=changes, corpus={"held_out": 0.1})
    texts = {row["key"]: row["text"] for row in documents()}
    assert len(made.documents) == len(texts)
    for row in made.documents:
        wanted = (tokenizer.bos_token if bos else "") + texts[row["key"]]
        assert made.text(tokenizer, row) == wanted


def test_isolated_documents_start_at_position_zero_and_share_no_sequence(tmp_path, ingredients, progress):
    made = tokenise(tmp_path, ingredients, progress, tokens={"packing": "isolated"})
    starts = [row["first_token_id"] for row in made.documents if row["n_tokens"]]
    assert {start % CONTEXT_LENGTH for start in starts} == {0}
    owners = np.array(made.tokens.column("document_id").fill_null(-1)).reshape(-1, CONTEXT_LENGTH)
    assert all(len(set(row[row >= 0])) == 1 for row in owners)


def test_bytes_of_the_vocabulary_put_together_give_the_text_back(tokenised, finished):
    vocab = pq.read_table(tokenised.artefact.path / "vocab.parquet")
    assert vocab.column("vocab_id").to_pylist() == list(range(vocab.num_rows))
    raw = vocab.column("bytes").to_pylist()
    owners, ids = tokenised.column("document_id"), tokenised.column("vocab_id")
    texts = {row["key"]: row["text"] for row in documents()}
    for row in tokenised.documents:
        assert b"".join(raw[i] for i in ids[owners == row["document_id"]]).decode() == texts[row["key"]]
    assert set(SCRIPTS) <= {row["key"] for row in tokenised.documents}
    pieces = vocab.column("piece").to_pylist()
    assert [piece for piece, entry in zip(pieces, raw, strict=True) if entry.decode("utf-8", "replace") != piece] == []


@pytest.fixture(scope="module")
def undisturbed(finished) -> dict[str, bytes]:
    return tree(Lineage(finished.store, finished.recipe).tokens.path)


@pytest.mark.parametrize("n_kept", range(5))
def test_tokenising_goes_on_after_any_number_of_finished_parts_to_the_same_bytes(
    tmp_path, finished, undisturbed, progress, n_kept
):
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root / "tokens", store.root / "tokens")
    Store.create(store.root)
    cut = Lineage(store, finished.recipe).tokens
    for part in cut.published().parts[n_kept:]:
        shutil.rmtree(cut.part_path(part))
    shutil.rmtree(cut.path / "generations")
    (cut.path / "manifest.json").unlink()
    tokens.run(Lineage(store, finished.recipe), progress)
    assert tree(cut.path) == undisturbed


@pytest.mark.parametrize("index", [0, 2, 4])
def test_one_damaged_part_is_made_again_to_the_same_bytes(tmp_path, finished, undisturbed, progress, index):
    store = Store(tmp_path / "store")
    shutil.copytree(finished.store.root / "tokens", store.root / "tokens")
    Store.create(store.root)
    cut = Lineage(store, finished.recipe).tokens
    (cut.part_path(cut.published().parts[index]) / "tokens.parquet").write_bytes(b"PAR1")
    tokens.run(Lineage(store, finished.recipe), progress)
    assert tree(cut.path) == undisturbed


def test_a_second_run_does_nothing_and_does_not_even_open_the_corpus(tmp_path, ingredients, finished, progress):
    corpus = write_corpus(tmp_path / "corpus.parquet")
    recipe = parse_recipe(recipe_data(ingredients, corpus={"files": [str(corpus)]}))
    store = Store.create(tmp_path / "store")
    path = tokens.run(Lineage(store, recipe), progress).path
    before = tree(path)
    corpus.unlink()
    tokens.run(Lineage(store, recipe), progress)
    assert tree(path) == before


def test_parts_of_a_killed_run_are_made_again_where_the_corpus_has_changed_since(tmp_path, ingredients, progress):
    corpus = write_corpus(tmp_path / "corpus.parquet")
    recipe = parse_recipe(recipe_data(ingredients, corpus={"files": [str(corpus)]}))
    store = Store.create(tmp_path / "store")
    made = tokens.run(Lineage(store, recipe), progress)
    os.unlink(made.path / "manifest.json")
    shutil.rmtree(made.path / "generations")
    write_corpus(corpus, documents()[:10])
    tokens.run(Lineage(store, recipe), progress)
    tokens.run(Lineage(Store.create(tmp_path / "fresh"), recipe), progress)
    assert tree(store.root / "tokens") == tree(tmp_path / "fresh" / "tokens")


def test_the_part_size_changes_neither_documents_nor_their_tokens(
    tmp_path, ingredients, tokenised, tokenizer, progress
):
    made = tokenise(tmp_path, ingredients, progress, tokens={"part_tokens": 100_000})
    assert len(made.artefact.published().parts) == 1
    for one, other in zip(made.documents, tokenised.documents, strict=True):
        assert {**one, "first_token_id": 0} == {**other, "first_token_id": 0}
        assert made.text(tokenizer, one) == tokenised.text(tokenizer, other)


def test_a_corpus_of_empty_documents_gives_no_sequences(tmp_path, ingredients, progress):
    corpus = write_corpus(tmp_path / "c.parquet", [{"key": k, "text": "", "source": "s", "title": "t"} for k in "ab"])
    made = tokenise(tmp_path, ingredients, progress, corpus={"files": [str(corpus)]})
    assert made.tokens.num_rows == 0
    assert [row["n_tokens"] for row in made.documents] == [0, 0]


def test_other_settings_make_another_artefact_and_an_equal_recipe_the_same(finished, ingredients):
    def fp(**changes) -> str:
        return Lineage(finished.store, parse_recipe(recipe_data(ingredients, **changes))).tokens.fp

    same = fp()
    assert same == fp(sae={"k": 2}, activations={"dtype": "float32"})
    others = [
        fp(tokens={"context_length": 8}), fp(tokens={"packing": "isolated"}), fp(tokens={"prepend_bos": True}),
        fp(corpus={"held_out": 0.3}), fp(corpus={"dedup": True}), fp(corpus={"files": ["other.parquet"]}),
    ]  # fmt: skip
    assert len({same, *others}) == 7


def test_bos_that_the_tokenizer_does_not_have_is_refused(tokenizer):
    class WithoutBos:
        bos_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return dict(tokenizer(text))

    with pytest.raises(UserError, match=r"tokens\.prepend_bos is true, but .* no BOS token\. Set it to false"):
        frame_of(WithoutBos(), CorpusConfig(), TokensConfig(prepend_bos=True))


@pytest.mark.parametrize("parse", [False, True])
def test_names_of_special_tokens_in_a_text_are_text_unless_the_recipe_says(
    tmp_path, ingredients, progress, tokenizer, parse
):
    corpus = write_corpus(tmp_path / "hostile.parquet", [{"key": "a", "text": "one<|endoftext|>two"}])
    changes = {"corpus": {"files": [str(corpus)]}, "tokens": {"parse_special": parse}}
    made = tokenise(tmp_path, ingredients, progress, **changes)
    ids = made.column("vocab_id")[made.column("mask")]
    assert (tokenizer.eos_token_id in ids) == parse
    assert made.text(tokenizer, made.documents[0]) == "one<|endoftext|>two"
