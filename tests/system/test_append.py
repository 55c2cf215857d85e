"""The corpus grows, changes and is forgotten in part: only what is new is worked on, nothing hidden is ever seen."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from saeflow.corpus import token_parts
from saeflow.corpus.document import Document
from saeflow.corpus.forgotten import ForgottenHashes
from saeflow.corpus.ledger import Ledger, key_hash
from saeflow.pipeline import encode, stages, tokens, train
from saeflow.pipeline.lifecycle import forget
from saeflow.pipeline.lifecycle.tidy import compact_store
from saeflow.pipeline.lineage import Lineage
from saeflow.query.ask import query
from saeflow.query.connection import check, connect
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.artefact import Artefact
from saeflow.store.garbage import collect_garbage
from saeflow.store.store import Store
from saeflow.store.verify import find_damage
from tests.support.small_pipeline import Ingredients, documents, quiet, recipe_data, tree, value_file, write_corpus

SECRET = "xylophone quixotry zugzwang"


@dataclass
class Grown:
    """A finished store whose corpus may be written anew."""

    store: Store
    recipe: Recipe
    corpus: Path

    def run(self, rows: list[dict[str, str]]) -> None:
        write_corpus(self.corpus, rows)
        stages.run(Lineage(self.store, self.recipe), quiet())

    def artefacts(self) -> list[Artefact]:
        lineage = Lineage(self.store, self.recipe)
        return [lineage.tokens, lineage.activations, lineage.features]

    def sql(self, text: str) -> list[dict[str, object]]:
        with contextlib.closing(connect(self.store)) as connection:
            rows: list[dict[str, object]] = query(connection, text).to_pylist()
            return rows

    def checked(self) -> list[str]:
        """Names of the checks of sql/checks that find something."""
        with contextlib.closing(connect(self.store)) as connection:
            return [name for name, rows in check(connection) if len(rows)]


FIRST = documents(40)
NEW = [{**row, "key": f"new/{row['key']}"} for row in documents(10, seed=5)[6:]]


@pytest.fixture(scope="module")
def once(ingredients, tmp_path_factory) -> Grown:
    """A finished store of the first documents."""
    folder = tmp_path_factory.mktemp("grown")
    corpus = folder / "corpus.parquet"
    recipe = parse_recipe(recipe_data(ingredients, corpus={"files": [str(corpus)]}, train={"n_tokens": 5000}))
    grown = Grown(Store.create(folder / "store"), recipe, corpus)
    grown.run(FIRST)
    return grown


@pytest.fixture
def grown(once, tmp_path) -> Grown:
    """A copy of it, with the corpus in its old place."""
    shutil.copytree(once.store.root, tmp_path / "store")
    write_corpus(once.corpus, FIRST)
    return Grown(Store(tmp_path / "store"), once.recipe, once.corpus)


def parts_of(grown: Grown) -> list[dict[str, bytes]]:
    return [tree(artefact.path / "parts") for artefact in grown.artefacts()]


def text_of(tmp: Path) -> bytes:
    return b"".join(path.read_bytes() for path in tmp.rglob("*") if path.is_file())


def test_the_same_corpus_again_adds_nothing(grown):
    before = tree(grown.store.root)
    grown.run(FIRST)  # a new file, so that it is read again
    assert tree(grown.store.root) == before


def test_documents_in_another_order_and_another_file_add_nothing(grown):
    before = tree(grown.store.root)
    grown.run(FIRST[::-1])
    assert tree(grown.store.root) == before


def test_appending_collects_and_encodes_only_the_new_parts(grown):
    before = parts_of(grown)
    grown.run(FIRST + NEW)
    for old, new, artefact in zip(before, parts_of(grown), grown.artefacts(), strict=True):
        assert new.items() >= old.items()
        assert len(new) > len(old)
        assert artefact.published().number == 2
    assert grown.artefacts()[0].published().total("n_documents") == len(FIRST) + len(NEW)
    assert {row["key"] for row in grown.sql("from documents")} == {row["key"] for row in FIRST + NEW}
    assert grown.checked() == []


def test_the_sae_trained_before_encodes_the_appended_documents_too(grown):
    sae = Lineage(grown.store, grown.recipe).sae
    before = {path.name for path in (grown.store.root / "saes").iterdir()}
    grown.run(FIRST + NEW)
    assert Lineage(grown.store, grown.recipe).sae == sae
    assert {path.name for path in (grown.store.root / "saes").iterdir()} == before
    covered = grown.sql(
        "select count(distinct key) as n from stg_token_major join tokens using (token_id) where key like 'new/%'"
    )
    assert covered[0]["n"] == len([row for row in NEW if row["text"]])


def test_the_feed_covers_old_and_new_documents_and_a_fresh_training_sees_both(grown):
    old = train.open_feed(Lineage(grown.store, grown.recipe)).n_rows
    grown.run(FIRST + NEW)
    source = grown.artefacts()[0].published()
    assert train.open_feed(Lineage(grown.store, grown.recipe)).n_rows == source.total("n_train_tokens") > old
    fresh = train.run(Lineage(grown.store, grown.recipe, fresh=True), quiet())
    assert fresh.record.facts["generation"] == 2
    assert Lineage(grown.store, grown.recipe).sae == fresh


@pytest.mark.long
def test_a_changed_document_replaces_the_old_version_everywhere(grown):
    changed = {**FIRST[-1], "text": "An entirely different text about zeppelins."}
    grown.run([*FIRST[:-1], changed])
    rows = grown.sql(f"from documents where key = '{changed['key']}'")
    assert len(rows) == 1
    pieces = grown.sql(
        f"select string_agg(piece, '' order by token_id) as text from tokens where key = '{changed['key']}'"
    )
    assert "zeppelins" in str(pieces[0]["text"])
    old = [d for each in grown.artefacts()[0].published().hidden.values() for d in each]
    assert [document.reason for document in old] == ["replaced"]
    assert grown.checked() == []
    before = tree(grown.store.root)
    grown.run([*FIRST[:-1], changed])
    assert tree(grown.store.root) == before


def test_held_out_documents_stay_held_out_when_others_are_appended(grown):
    before = {row["key"]: row["held_out"] for row in grown.sql("from documents")}
    grown.run(FIRST + NEW)
    after = {row["key"]: row["held_out"] for row in grown.sql("from documents")}
    assert after.items() >= before.items()


def test_equal_keys_are_kept_apart_by_a_number_and_come_once(grown):
    twice = [*FIRST, {**FIRST[-1], "text": "The same key, another text."}]
    grown.run(twice)
    keys = [str(row["key"]) for row in grown.sql("from documents")]
    assert len(keys) == len(set(keys)) == len(twice)
    before = tree(grown.store.root)
    grown.run(twice)
    assert tree(grown.store.root) == before


def with_secret() -> list[dict[str, str]]:
    return [*FIRST, {"key": "secret/one", "text": SECRET * 9, "source": "secrets", "title": "Zugzwang"}]


def token_ids_of(grown: Grown, key: str) -> set[object]:
    return {row["token_id"] for row in grown.sql(f"from tokens where key = '{key}'")}


def test_a_forgotten_document_is_gone_from_every_view_at_once(grown):
    grown.run(with_secret())
    owned = token_ids_of(grown, "secret/one")
    n_values = grown.sql("select sum(n_tokens) as n from stg_feature_stats")[0]["n"]
    fired = grown.sql("select token_id, feature_id, value from stg_token_major")
    done = forget.forget(grown.store, ["secret/one"], quiet())
    assert list(done.documents.values()) == [1]
    assert done.runs == [grown.artefacts()[2].id]
    assert token_ids_of(grown, "secret/one") == set()
    assert grown.sql("from documents where source = 'secrets'") == []
    kept = [row for row in fired if row["token_id"] not in owned]
    assert grown.sql("select token_id, feature_id, value from stg_token_major") == kept
    assert len(kept) < len(fired)
    assert grown.sql("select sum(n_tokens) as n from stg_feature_stats")[0]["n"] == len(kept) < int(str(n_values))
    assert grown.checked() == []


@pytest.mark.long
def test_a_forgotten_document_is_gone_from_the_feed(grown):
    grown.run(with_secret())
    key = next(str(row["key"]) for row in grown.sql("from documents where not held_out and n_tokens > 20"))
    n_tokens = len(token_ids_of(grown, key))
    before = train.open_feed(Lineage(grown.store, grown.recipe)).n_rows
    forget.forget(grown.store, [key], quiet())
    feed = train.open_feed(Lineage(grown.store, grown.recipe))
    assert feed.n_rows == before - n_tokens
    assert (
        sum(len(batch) for batch, _ in zip(feed.batches(), range(feed.batches_per_epoch), strict=False)) == feed.n_rows
    )


@pytest.mark.long
def test_views_leave_a_part_out_while_it_still_holds_values_of_a_forgotten_document(grown, monkeypatch, caplog):
    grown.run(with_secret())
    owned = token_ids_of(grown, "secret/one")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "refresh", killed)
        with pytest.raises(KeyboardInterrupt):
            forget.forget(grown.store, ["secret/one"], quiet())
    assert not owned & {row["token_id"] for row in grown.sql("select token_id, feature_id, value from stg_token_major")}
    assert "parts are left out" in caplog.text
    again = forget.forget(grown.store, ["secret/one"], quiet())
    assert again.runs == [grown.artefacts()[2].id]  # the same command finishes
    caplog.clear()
    assert grown.sql("select token_id, feature_id, value from stg_token_major")
    assert caplog.text == ""


def test_a_forgotten_document_does_not_come_back_with_the_same_corpus(grown):
    grown.run(with_secret())
    forget.forget(grown.store, ["secret/one"], quiet())
    before = tree(grown.store.root)
    grown.run(with_secret())
    assert tree(grown.store.root).keys() == before.keys()
    assert token_ids_of(grown, "secret/one") == set()


def test_forgetting_lists_the_saes_that_saw_the_document_and_those_that_did_not(grown):
    sae = Lineage(grown.store, grown.recipe).sae
    rows = grown.sql("from documents where n_tokens > 0 order by key")
    seen = next(str(row["key"]) for row in rows if not row["held_out"])
    held = next(str(row["key"]) for row in rows if row["held_out"])
    assert forget.forget(grown.store, [seen], quiet()).saes == [sae.id]
    assert forget.forget(grown.store, [held], quiet()).held_out_only == [sae.id]
    grown.run(with_secret())
    assert forget.forget(grown.store, ["secret/one"], quiet()).saes == []  # appended after its training


def test_a_version_that_comes_in_while_documents_are_being_forgotten_is_forgotten_too(grown, monkeypatch):
    key = str(FIRST[-1]["key"])
    hide = forget._hide

    def late(*about):
        """An ingest of a changed text ends between the look at the keys and the lease."""
        write_corpus(grown.corpus, [*FIRST[:-1], {**FIRST[-1], "text": SECRET}])
        tokens.run(Lineage(grown.store, grown.recipe), quiet())
        return hide(*about)

    monkeypatch.setattr(forget, "_hide", late)
    assert forget.forget(grown.store, [key], quiet()).documents == {Lineage(grown.store, grown.recipe).tokens.id: 1}
    assert list(grown.sql(f"from documents where key = '{key}'")) == []


def test_forgetting_goes_on_where_the_activations_are_gone_and_names_the_saes_that_may_have_seen_them(grown):
    lineage = Lineage(grown.store, grown.recipe)
    sae, run = lineage.sae.id, lineage.features.id
    shutil.rmtree(Lineage(grown.store, grown.recipe).activations.path)
    key = next(str(row["key"]) for row in grown.sql("from documents where not held_out and n_tokens > 0 order by key"))
    done = forget.forget(grown.store, [key], quiet())
    assert (done.saes, list(done.waiting)) == ([sae], [run])
    assert list(grown.sql(f"from documents where key = '{key}'")) == []


def test_another_version_of_pyarrow_changes_nothing_of_a_vocabulary_that_is_there(grown):
    """It writes its name into each file."""
    source = Lineage(grown.store, grown.recipe).tokens
    ours = (source.path / "vocab.parquet").read_bytes()
    before = ours.replace(b"parquet-cpp-arrow version", b"parquet-cpp-arrow Version")
    (source.path / "vocab.parquet").write_bytes(before)
    source.add_files(["vocab.parquet"])
    write_corpus(grown.corpus, [*FIRST, *NEW])
    tokens.run(Lineage(grown.store, grown.recipe), quiet())
    assert (source.path / "vocab.parquet").read_bytes() == before
    (source.path / "vocab.parquet").unlink()
    source = tokens.run(Lineage(grown.store, grown.recipe), quiet())
    assert (source.path / "vocab.parquet").read_bytes() == ours != before
    assert list(find_damage(Lineage(grown.store, grown.recipe).tokens, full=True)) == []


def test_a_key_that_nobody_has_hides_nothing_and_says_how_to_list_keys(grown):
    before = tree(grown.store.root)
    with pytest.raises(UserError, match=r"No document is called 'nobody'.*\n.*select key"):
        forget.forget(grown.store, [str(FIRST[-1]["key"]), "nobody"], quiet())
    assert tree(grown.store.root) == before


@pytest.mark.long
def test_the_summary_counts_what_the_view_documents_shows(grown):
    def agree() -> bool:
        (shown,) = grown.sql("select count(*) as n_documents, sum(n_tokens)::bigint as n_tokens from documents")
        return shown.items() <= stages.summary(Lineage(grown.store, grown.recipe)).items()

    grown.run([{**FIRST[0], "text": "replaced by this"}, *FIRST[1:], *NEW])
    assert agree()
    forget.forget(grown.store, [str(FIRST[1]["key"]), str(NEW[0]["key"])], quiet())
    assert agree()
    compact_store(Lineage(grown.store, grown.recipe), quiet())
    assert agree()


@pytest.mark.long
def test_compaction_and_gc_leave_no_trace_of_a_forgotten_document(grown):
    grown.run(with_secret())
    forget.forget(grown.store, ["secret/one"], quiet())
    assert b"secret/one" in documents_of(grown)
    compact_store(Lineage(grown.store, grown.recipe), quiet())
    assert list(grown.sql("from documents where key = 'secret/one'")) == []
    collect_garbage(grown.store, grace_seconds=0, remove=True)
    assert b"secret/one" not in documents_of(grown)
    everything = text_of(grown.store.root)
    for trace in (b"secret/one", b"Zugzwang", SECRET.encode()):
        assert trace not in everything
    assert [str(found) for artefact in grown.store.artefacts() for found in find_damage(artefact, full=True)] == []
    assert grown.checked() == []


def documents_of(grown: Grown) -> bytes:
    """Keys and titles in any documents.parquet of the store, readable or not by any view."""
    found = []
    for path in sorted(grown.store.root.rglob("documents.parquet")):
        table = pq.read_table(path, columns=["key", "title"])
        found += [str(value) for column in table.to_pydict().values() for value in column]
    return "\n".join(found).encode()


@pytest.mark.long
def test_compaction_moves_no_other_token_and_changes_no_other_value_outside_the_rewritten_part(grown):
    grown.run(with_secret())
    forget.forget(grown.store, ["secret/one"], quiet())
    source = grown.artefacts()[0]
    touched = set(source.published().hidden)
    before = {row["token_id"]: row for row in grown.sql("from tokens")}
    values = grown.sql("select token_id, feature_id, value from stg_token_major")
    compact_store(Lineage(grown.store, grown.recipe), quiet())
    assert {row["token_id"]: row for row in grown.sql("from tokens")} == before
    length = grown.recipe.tokens.context_length
    parts = [part for part in source.published().parts if part.index not in touched]
    ranges = [
        (p.counts["first_sequence"] * length, (p.counts["first_sequence"] + p.counts["n_sequences"]) * length)
        for p in parts
    ]

    def outside(rows: list[dict[str, object]]) -> list[dict[str, object]]:
        return [row for row in rows if any(a <= int(str(row["token_id"])) < b for a, b in ranges)]

    assert outside(grown.sql("select token_id, feature_id, value from stg_token_major")) == outside(values)


@pytest.mark.long
def test_a_compacted_store_trains_and_runs_on(grown):
    grown.run(with_secret())
    key = next(str(row["key"]) for row in grown.sql("from documents where not held_out and n_tokens > 20"))
    forget.forget(grown.store, [key], quiet())
    n_rows = train.open_feed(Lineage(grown.store, grown.recipe)).n_rows
    compact_store(Lineage(grown.store, grown.recipe), quiet())
    assert train.open_feed(Lineage(grown.store, grown.recipe)).n_rows == n_rows
    grown.run(with_secret() + NEW)
    assert grown.checked() == []
    assert token_ids_of(grown, key) == set()
    assert len(token_ids_of(grown, str(NEW[-1]["key"]))) > 0


@pytest.mark.long
def test_an_append_that_is_killed_is_finished_to_the_same_bytes(grown, tmp_path, monkeypatch):
    undisturbed = Grown(Store(tmp_path / "undisturbed"), grown.recipe, grown.corpus)
    shutil.copytree(grown.store.root, undisturbed.store.root)
    undisturbed.run(FIRST + NEW)
    real = Artefact.publish

    def killed(self: Artefact, *arguments: object, **options: object) -> object:
        if self.kind == killed.kind:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    for kind in ("tokens", "activations", "features"):
        with monkeypatch.context() as patch:
            killed.kind = kind  # type: ignore[attr-defined]
            patch.setattr(Artefact, "publish", killed)
            with pytest.raises(KeyboardInterrupt):
                grown.run(FIRST + NEW)
    grown.run(FIRST + NEW)
    assert tree(grown.store.root) == tree(undisturbed.store.root)


def test_a_lost_token_part_is_made_again_while_the_corpus_has_grown(grown):
    source = grown.artefacts()[0]
    before = tree(source.path / "parts")
    lost = source.part_path(source.published().parts[1])
    shutil.rmtree(lost)
    grown.run(FIRST)
    assert tree(source.path / "parts") == before


def test_a_lost_token_part_whose_documents_are_gone_is_refused_with_the_way_out(grown):
    source = grown.artefacts()[0]
    shutil.rmtree(source.part_path(source.published().parts[1]))
    with pytest.raises(
        UserError, match=r"Part 1 of tokens/.* is damaged, and the corpus no longer.*\nBring the corpus back"
    ):
        grown.run(FIRST[:20])


def test_positions_that_are_skipped_are_stored_but_never_used(grown):
    changed = parse_recipe(
        grown.recipe.model_dump() | {"activations": grown.recipe.activations.model_dump() | {"skip_positions": [0, 3]}}
    )
    assert Lineage(grown.store, changed).activations == Lineage(grown.store, grown.recipe).activations
    stages.run(Lineage(grown.store, changed), quiet())
    assert Lineage(grown.store, changed).sae != Lineage(grown.store, grown.recipe).sae
    run = Lineage(grown.store, changed).features
    ids = np.concatenate(
        [pq.read_table(value_file(run.part_path(p))).column("token_id").to_numpy() for p in run.published().parts]
    )
    assert not set((ids % changed.tokens.context_length).tolist()) & {0, 3}
    assert len(set((ids % changed.tokens.context_length).tolist())) == changed.tokens.context_length - 2
    real = np.concatenate(
        [token_parts.read_part(grown.artefacts()[0], p)[1] for p in grown.artefacts()[0].published().parts]
    )
    real[:, [0, 3]] = False
    assert run.published().total("n_tokens") == real.sum()


def test_a_position_outside_of_the_sequence_is_refused(grown):
    changed = parse_recipe(
        grown.recipe.model_dump() | {"activations": grown.recipe.activations.model_dump() | {"skip_positions": [16]}}
    )
    with pytest.raises(UserError, match=r"skip_positions is \[16\]; sequences have the positions 0 to 15"):
        train.run(Lineage(grown.store, changed), quiet())


@pytest.mark.long
def test_special_tokens_may_be_left_out(grown):
    changed = parse_recipe(
        recipe_of(grown, tokens={"prepend_bos": True}, activations={"skip_special": True}) | {"name": "special"}
    )
    stages.run(Lineage(grown.store, changed), Progress(verbosity=-1))
    with contextlib.closing(connect(grown.store, "special")) as connection:
        rows = query(
            connection, "select distinct piece from tokens semi join stg_token_major using (token_id)"
        ).to_pylist()
        every = query(connection, "select distinct piece from tokens").to_pylist()
    assert "<|endoftext|>" in {row["piece"] for row in every}
    assert "<|endoftext|>" not in {row["piece"] for row in rows}


def recipe_of(grown: Grown, **changes: dict[str, object]) -> dict[str, object]:
    data = grown.recipe.model_dump()
    return {key: {**value, **changes[key]} if key in changes else value for key, value in data.items()}


def repeated(ingredients: Ingredients, rows: list[tuple[str, str]], tmp_path: Path, **corpus: object) -> Recipe:
    """A recipe whose corpus is these keys and texts."""
    write_corpus(tmp_path / "repeated.parquet", [{"key": key, "text": text} for key, text in rows])
    return parse_recipe(recipe_data(ingredients, corpus={"files": [str(tmp_path / "repeated.parquet")], **corpus}))


def stored_keys(store: Store, recipe: Recipe) -> list[str]:
    source = Lineage(store, recipe).tokens
    generation = source.published()
    tables = [pq.read_table(source.part_file(part, "documents.parquet")) for part in generation.parts]
    return [
        row["key"] for table in tables for row in table.to_pylist() if row["document_id"] not in generation.hidden_ids
    ]


def test_repeated_keys_are_told_apart_by_content_so_that_what_was_forgotten_stays_so(ingredients, tmp_path, progress):
    store = Store.create(tmp_path / "store")
    recipe = repeated(ingredients, [("a", "the first text"), ("a", "the secret text"), ("b", "other")], tmp_path)
    tokens.run(Lineage(store, recipe), progress)
    (secret,) = [key for key in stored_keys(store, recipe) if key.startswith("a#")]
    forget.forget(store, [secret], progress)
    by_content = {
        f"a#{Document('a', text, '').content_hash[:8]}": text for text in ("the first text", "the secret text")
    }
    left = repeated(ingredients, [("a", by_content[secret]), ("b", "other")], tmp_path)
    made = tokens.run(Lineage(store, left), progress).published()
    assert made.total("n_documents") == 3, "the forgotten text did not come back under another key"
    assert secret not in stored_keys(store, recipe)


def test_a_key_that_looks_like_a_repeated_one_is_no_other_document(ingredients, tmp_path, progress):
    store = Store.create(tmp_path / "store")
    rows = [("a", "one"), ("a", "two"), ("a (2)", "three"), ("a", "one")]
    recipe = repeated(ingredients, rows, tmp_path)
    first = tokens.run(Lineage(store, recipe), progress).published()
    assert len(set(stored_keys(store, recipe))) == 4
    os.utime(tmp_path / "repeated.parquet")
    assert tokens.run(Lineage(store, recipe), progress).published() == first


def test_dedup_knows_the_texts_that_are_stored(ingredients, tmp_path, progress):
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, repeated(ingredients, [("b", "same"), ("c", "other")], tmp_path, dedup=True)), progress)
    recipe = repeated(ingredients, [("a", "same"), ("b", "same"), ("c", "other")], tmp_path, dedup=True)
    tokens.run(Lineage(store, recipe), progress)
    assert sorted(stored_keys(store, recipe)) == ["b", "c"]


@pytest.mark.parametrize("new", ["a", "z"])
def test_dedup_keeps_a_text_that_moves_from_one_document_to_another(ingredients, tmp_path, progress, new):
    store = Store.create(tmp_path / "store")
    tokens.run(Lineage(store, repeated(ingredients, [("m", "moves"), ("n", "stays")], tmp_path, dedup=True)), progress)
    rows = sorted([("m", "another"), ("n", "stays"), (new, "moves")])
    tokens.run(Lineage(store, recipe := repeated(ingredients, rows, tmp_path, dedup=True)), progress)
    assert sorted(stored_keys(store, recipe)) == sorted([new, "m", "n"])


def test_a_recipe_that_begins_anew_says_which_setting_made_it(ingredients, tmp_path, capsys):
    store = Store.create(tmp_path / "store")
    first = tokens.run(Lineage(store, repeated(ingredients, [("a", "one")], tmp_path)), Progress())
    assert "a new artefact" not in capsys.readouterr().err
    changed = repeated(ingredients, [("a", "one")], tmp_path, held_out=0.5)
    tokens.run(Lineage(store, changed), Progress())
    said = " ".join(capsys.readouterr().err.split())
    assert f"tokens: a new artefact beside {first.id}, because of corpus.held_out. To go on with that one" in said
    tokens.run(Lineage(store, changed), Progress())
    assert "a new artefact" not in capsys.readouterr().err


CONTENTS = ("one text", "another text", "a third text")


@pytest.mark.parametrize("first", list(itertools.product(CONTENTS, repeat=2)) + list(itertools.permutations(CONTENTS)))
def test_documents_of_one_key_are_the_same_ones_in_any_order(first):
    """Held as `first` gives them; every order of them, and of them without one, adds nothing and changes nothing."""
    about = CorpusConfig(files=["x"])
    rows = [Document("a", text, "") for text in first]
    held = list(Ledger.of([]).entries_to_store(rows, about))
    assert len({entry.key for entry in held}) == len(first)
    for left in range(1, len(first) + 1):
        for again in itertools.permutations(rows, left):
            ledger = Ledger.of([(entry.key, entry.document.content_hash) for entry in held])
            assert list(ledger.entries_to_store(again, about)) == [], again


def test_a_forgotten_text_stays_away_whatever_comes_under_its_key():
    about = CorpusConfig(files=["x"])
    for others in (["a new text"], ["a new text", "another"]):
        for order in itertools.permutations(["the secret", *others]):
            ledger = replace(Ledger.of([]), forgotten=ForgottenHashes(frozenset({(key_hash("a"), "")})))
            stored = ledger.entries_to_store([Document("a", text, "") for text in order], about)
            assert "the secret" not in [entry.document.content for entry in stored]
