"""Character offsets: each token knows which characters of its document's text it stands for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from saeflow.corpus.token_parts import has_marks
from saeflow.corpus.tokenise.texts import MARK_TYPES
from saeflow.pipeline import stages, tokens
from saeflow.pipeline.lifecycle.forget import erase_hidden_tokens, forget
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import ask, query
from saeflow.query.connection import check, connect
from saeflow.recipe.recipe import Recipe, load_recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact
from saeflow.store.store import Store
from saeflow.store.verify import repair_all, verify
from tests.support.small_pipeline import SCRIPTS, Ingredients, documents, quiet, recipe_data, write_corpus
from tests.support.small_store import Document, Given
from tests.support.tokenizers import BYTES, FAMILIES

TWENTY = {
    "latin": "Ærøskøbing, Łódź and İstanbul: ﬁne ﬂour, ½ pound",
    "greek": "Ἀρχὴ σοφίας φόβος Κυρίου",
    "cyrillic": "Все счастливые семьи похожи друг на друга; й = и\u0306",
    "armenian": "Բոլոր մարդիկ ծնվում են ազատ",
    "georgian": "ყველა ადამიანი იბადება თავისუფალი",
    "hebrew": "בְּרֵאשִׁית בָּרָא אֱלֹהִים",
    "arabic": "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ﷺ",
    "syriac": "ܒܪܫܝܬ ܐܝܬܘܗܝ ܗܘܐ ܡܠܬܐ",
    "devanagari": "सभी मनुष्य स्वतन्त्र पैदा होते हैं",
    "bengali": "সমস্ত মানুষ স্বাধীনভাবে",
    "tamil": "மனிதப் பிறவியினர் சகலரும்",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་",
    "myanmar": "လူတိုင်းသည် တူညီလွတ်လပ်သော",
    "khmer": "មនុស្សទាំងអស់កើតមក",
    "ethiopic": "የሰው ልጅ ሁሉ ሲወለድ ነጻ",
    "hangul": "모든 인간은 태어날 때부터; \u1112\u1161\u11ab",
    "han": "人人生而自由，在尊嚴和權利上一律平等。𠮷野家",
    "kana": "すべての人間は、ｶﾞｷﾞｸﾞ か\u3099",
    "cuneiform": "𒀀𒁀 and 𐤀𐤁 and 𝔉𝔯𝔞𝔨𝔱𝔲𝔯",
    "families": "👩‍👩‍👧‍👦 and 🏴󠁧󠁢󠁷󠁬󠁳󠁿 and 🐈‍⬛, 🏳️‍🌈",
    "flags and skins": "🇨🇭🇫🇷🇺 👍🏽👍🏿 🧑🏻‍🤝‍🧑🏿 1️⃣",
    "marks": "Z\u0351\u036b\u0343a\u0334l\u0321g\u0322o\u0360 e\u0301 \u0301 alone, a\u200bb\ufeffc\u00ad",
    "names": "a [SEP] b <s> c <|endoftext|> d",
    **SCRIPTS,
}  # fmt: skip


def normalised() -> Any:
    """Byte-level BPE over a text that is folded to NFKC and lower case, after a blank, as some decoders have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=letters)
    tokenizer.train_from_iterator([row["text"] for row in documents()], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def fallback() -> Any:
    """Unigram that spells unknown letters in bytes, as sentencepiece does."""
    entries = [("<unk>", 0.0), ("▁", -2.0), ("▁and", -3.0), *((letter, -4.0) for letter in "abcdefghé人ü")]
    entries += [(name, -20.0) for name in BYTES]
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], Any]] = {**FAMILIES, "normalised": normalised, "fallback": fallback}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("offsets")
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folder / name)
    write_corpus(folder / "corpus.parquet", [{"key": key, "text": text} for key, text in TWENTY.items()])
    return folder


def recipe_of(root: Path, tokenizer: str, **changes: Any) -> Recipe:
    ingredients = Ingredients(root / tokenizer, root / "corpus.parquet")
    return parse_recipe(recipe_data(ingredients, **{"corpus": {"held_out": 0.3}} | changes))


def rows_of(artefact: Artefact) -> dict[str, list[dict[str, Any]]]:
    """Real tokens in order, by the key of their document."""
    folders = [artefact.part_path(part) for part in artefact.published().parts]
    keys = {
        row["document_id"]: row["key"] for f in folders for row in pq.read_table(f / "documents.parquet").to_pylist()
    }
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in keys.values()}
    for row in (row for folder in folders for row in pq.read_table(folder / "tokens.parquet").to_pylist()):
        if row["mask"]:
            found[keys[row["document_id"]]].append(row)
        else:
            assert row["char_start"] is row["char_end"] is None
    return found


@dataclass(frozen=True)
class Layout:
    packing: str
    length: int
    part_tokens: int = 262_144


LAYOUTS = [Layout("concatenated", 16, 60), Layout("isolated", 16), Layout("isolated", 10_000)]


QUICK = LAYOUTS[:1]


@pytest.mark.parametrize(
    "layout",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in LAYOUTS],
    ids=lambda layout: f"{layout.packing} {layout.length}",
)
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "byt5"])
def test_every_token_has_the_characters_that_its_tokenizer_says(
    tmp_path: Path, root: Path, made: dict[str, Any], name: str, layout: Layout
) -> None:
    about = {"context_length": layout.length, "packing": layout.packing, "part_tokens": layout.part_tokens}
    artefact = tokens.run(Lineage(Store.create(tmp_path), recipe_of(root, name, tokens=about)), quiet())
    for key, rows in rows_of(artefact).items():
        text = TWENTY[key]
        own = made[name](text, split_special_tokens=True, add_special_tokens=False, return_offsets_mapping=True)
        marked = [row for row in rows if row["char_start"] is not None]
        assert [row["vocab_id"] for row in marked] == own["input_ids"], key
        mine = [(row["char_start"], row["char_end"]) for row in marked]
        assert mine == own["offset_mapping"], key
        assert [text[a:b] for a, b in mine] == [text[a:b] for a, b in own["offset_mapping"]]
        special = {row["vocab_id"] for row in rows if row["char_start"] is None}
        assert special <= {*made[name].all_special_ids}
        if name in ("gpt2", "llama", "gemma", "roberta"):  # no letter is lost or unknown
            covered = np.zeros(len(text), bool)
            for a, b in mine:
                covered[a:b] = True
            assert not "".join(c for c, is_in in zip(text, covered, strict=True) if not is_in).strip(), key
    parts = artefact.published().parts
    assert sum(part.counts["n_offsets"] for part in parts) == sum(
        row["char_start"] is not None for rows in rows_of(artefact).values() for row in rows
    )


def test_tokens_that_share_the_bytes_of_one_letter_all_have_that_letter(
    tmp_path: Path, root: Path, made: dict[str, Any]
) -> None:
    rows = rows_of(tokens.run(Lineage(Store.create(tmp_path), recipe_of(root, "gpt2")), quiet()))["han"]
    at = TWENTY["han"].index("𠮷")
    assert len([row for row in rows if (row["char_start"], row["char_end"]) == (at, at + 1)]) == 4


def test_tokens_without_a_text_or_of_a_tokenizer_in_python_have_none(tmp_path: Path, root: Path) -> None:
    slow = tokens.run(Lineage(Store.create(tmp_path / "slow"), recipe_of(root, "byt5")), quiet())
    table = pa.table({"key": ["a"], "ids": pa.array([[5, 6, 7]])})
    pq.write_table(table, tmp_path / "ids.parquet")
    about = {"token_ids": "ids", "files": [str(tmp_path / "ids.parquet")]}
    ids = tokens.run(Lineage(Store.create(tmp_path / "ids"), recipe_of(root, "gpt2", corpus=about)), quiet())
    for artefact in (slow, ids):
        assert all(part.counts["n_offsets"] == 0 for part in artefact.published().parts)
        for rows in rows_of(artefact).values():
            assert {(row["char_start"], row["char_end"]) for row in rows} <= {(None, None)}


def test_offsets_cost_little_room(tmp_path: Path, finished: Any) -> None:
    artefact = Lineage(finished.store, finished.recipe).tokens
    about = [pq.read_metadata(artefact.part_file(part, "tokens.parquet")) for part in artefact.published().parts]
    n_bytes = sum(
        column.total_compressed_size
        for each in about
        for column in map(each.row_group(0).column, range(each.num_columns))
        if column.path_in_schema in MARK_TYPES
    )
    assert n_bytes < 4 * sum(each.num_rows for each in about) + 1000 * len(about)


def old_parts(artefact: Artefact) -> list[bool]:
    return [has_marks(part) for part in artefact.published().parts]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lineage:
    """The store of the last format, as an earlier saeflow wrote it, with its recipe in the working directory."""
    shutil.copytree(Path(__file__).resolve().parents[1] / "stores" / "format_2", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Lineage(Store.open("store"), load_recipe(Path("small.toml")))


@pytest.mark.long
def test_tokens_of_an_earlier_saeflow_answer_without_characters_and_new_documents_have_them(old: Lineage) -> None:
    table = pq.read_table("corpus.parquet")
    new = {field.name: ["added"] for field in table.schema} | {"text": ["A cat, été 🐈."]}
    pq.write_table(pa.concat_tables([table, pa.table(new, table.schema)]), "corpus.parquet")
    stages.run(old.anew(), quiet())
    assert old_parts(old.tokens) == [False] * (len(old_parts(old.tokens)) - 1) + [True]
    with connect(old.store) as connection:
        assert not [name for name, rows in check(connection) if len(rows)]
        counted = query(connection, "select key = 'added' as is_new, count(char_start) as n from tokens group by all")
        assert {row["is_new"]: row["n"] > 0 for row in counted.to_pylist()} == {True: True, False: False}
        found = ask(connection, "tokens_of_span", ["added", 7, 10]).to_pylist()
        assert {(row["char_start"] < 10 and row["char_end"] > 7) for row in found} == {True}
        key = query(connection, "select key from documents where key <> 'added' and n_tokens > 3 limit 1")
        with pytest.raises(
            UserError, match=r"an earlier saeflow wrote them.\nWrite them anew: saeflow run RECIPE --set name=NEW"
        ):
            ask(connection, "tokens_of_span", [key.column("key")[0].as_py(), 0, 3])


def test_a_lost_part_of_an_earlier_saeflow_is_made_again_byte_for_byte(old: Lineage) -> None:
    part = old.tokens.published().parts[0]
    path = old.tokens.part_path(part) / "tokens.parquet"
    before = path.read_bytes()
    path.unlink()
    list(repair_all(verify(old.store, full=False)))
    tokens.run(old.anew(), quiet())
    assert path.read_bytes() == before


def test_a_forgotten_document_leaves_no_offsets_behind(tmp_path: Path, root: Path) -> None:
    store = Store.create(tmp_path)
    lineage = Lineage(store, recipe_of(root, "gpt2"))
    artefact = tokens.run(lineage, quiet())
    before = artefact.published().total("n_offsets")
    gone = sum(row["char_start"] is not None for row in rows_of(artefact)["han"])
    forget(store, ["han"], quiet())
    erase_hidden_tokens(artefact, quiet())
    assert "han" not in rows_of(artefact)
    assert artefact.published().total("n_offsets") == before - gone


SPANS = [Document("one", "a", [b"Em", b"ma \xf0\x9f", b"\x90\x88", b"!"]), Document("two", "a", [b"Em"])]


@pytest.mark.parametrize(
    ("span", "expected"),
    [((0, 1), [0]), ((0, 4), [0, 1]), ((5, 6), [1, 2]), ((6, 7), [3]), ((6, 99), [3]), ((7, 99), []), ((3, 3), [])],
)
def test_a_span_has_every_token_with_one_of_its_characters(
    tmp_path: Path, span: tuple[int, int], expected: list[int]
) -> None:
    with connect(Given(documents=SPANS, values=[(0, 0, 1.0)]).write(tmp_path)) as connection:
        found = ask(connection, "tokens_of_span", ["one", *span]).to_pylist()
        assert [row["token_id"] for row in found] == expected
        assert {row["key"] for row in found} <= {"one"}
        assert ask(connection, "tokens_of_span", ["nothing", *span]).num_rows == 0


def test_a_table_of_spans_joins_with_the_tokens(tmp_path: Path) -> None:
    spans = "(values ('one', 5, 6, 'animal'), ('two', 0, 2, 'name')) as spans(key, first_char, end_char, label)"
    on = "char_start < end_char and char_end > first_char"
    with connect(Given(documents=SPANS, values=[(0, 0, 1.0)]).write(tmp_path)) as connection:
        found = query(
            connection, f"select label, token_id from tokens join {spans} using (key) where {on} order by all"
        )
    assert list(zip(*found.to_pydict().values(), strict=True)) == [("animal", 1), ("animal", 2), ("name", 4)]
