"""Documents to fixed-length sequences of tokens, in parts that hold whole documents."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.corpus import sources
from saeflow.corpus.forgotten import ForgottenHashes
from saeflow.corpus.ledger import Entry, Ledger, group_by_part, merge_hidden
from saeflow.corpus.selection import positions_from_start
from saeflow.corpus.token_parts import TokenPartWriter
from saeflow.corpus.vocabulary import chosen_vocab_ids, tokenizer_vocab, write_vocab
from saeflow.model.load import load_tokenizer
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.progress import Bar, Progress
from saeflow.store.artefact import Artefact
from saeflow.store.files import make_folder
from saeflow.store.records import Generation, PartRecord, add_provenance, provenance_value


def run(lineage: Lineage, progress: Progress) -> Artefact:
    """Tokenise documents that are new or changed, and rebuild lost parts; the sample to train on has its own tokens."""
    if lineage.training is not lineage:
        run(lineage.training, progress)
    recipe, target = lineage.recipe, lineage.tokens
    assert recipe.corpus is not None
    with target.writing():
        generation = target.generation() or Generation(0, ())
        done = target.parts()
        lost = [part for part in generation.parts if done.get(part.index) != part]
        whole = bool(generation.number) and not lost and target.complete()
        try:
            about = sources.pin_to_commits(recipe.corpus)
            seen = sources.corpus_signature(about)
        except UserError as error:
            if not whole:
                raise
            progress.say(f"tokens: the corpus is gone, going on with what is stored ({first_line(error)})")
            return target
        if whole and seen is not None and seen == provenance_value(target.path, "corpus"):
            progress.skip("tokens", f"{generation.total('n_tokens'):,} tokens in {len(generation.parts)} parts")
            return target
        began = time.monotonic()
        if different := lineage.store.why_new(target, lineage.token_facts):
            progress.say(f"{different} A glob such as texts/*.txt takes new files as new documents.")
        maker, forgotten = _open_maker(lineage, about), ForgottenHashes.read(lineage.store)
        with progress.bar("tokens", None, "tokens") as bar:
            kept = {part.index: part for part in generation.parts} | _restored(maker, lost, generation, forgotten, bar)
            parts, ledger = _append(maker, generation, done, forgotten, bar)
        hidden = merge_hidden(generation.hidden, ledger.replaced(generation.parts))
        hidden = merge_hidden(hidden, group_by_part(ledger.to_forget(), generation.parts))
        target.publish([*kept.values(), *parts], {"seconds": time.monotonic() - began}, hidden)
        is_complete = ledger.is_complete and ForgottenHashes.read(lineage.store) == forgotten
        if seen is not None and is_complete:
            add_provenance(target.path, {"corpus": seen, "corpus_files": about.files})
            target.storage.send(target.path / "provenance.json")
        progress.say(_token_summary(ledger, generation))
    return target if is_complete else run(lineage, progress)


def _token_summary(ledger: Ledger, before: Generation) -> str:
    found = ledger.n_by_verdict
    said = f"tokens: {found['new']:,} documents are new"
    if before.number:
        said += f", {found['changed']:,} changed, {found['same']:,} as before"
    if found["forgotten"]:
        said += f"; {found['forgotten']:,} are left out: the store has forgotten them (`saeflow forget --undo KEY`)"
    return said + (f"; {ledger.n_repeated:,} keys came again and got their content added" if ledger.n_repeated else "")


def _open_maker(lineage: Lineage, about: CorpusConfig) -> TokenPartWriter:
    recipe, target = lineage.recipe, lineage.tokens
    assert recipe.model is not None
    positions_from_start(recipe.activations.skip_positions, recipe.tokens.context_length)
    tokenizer = load_tokenizer(recipe.model)
    maker = TokenPartWriter(target, tokenizer, about, recipe.tokens)
    files = [file for file in target.record.files if file.name == "vocab.parquet"] if target.exists() else []
    if not files or list(target.missing_files(target.path, files, full=True)):
        make_folder(target.path)
        write_vocab(target.path / "vocab.parquet", *tokenizer_vocab(tokenizer), _special_ids(tokenizer))
        chosen_vocab_ids(target.path / "vocab.parquet", recipe.activations.skip_special)  # a wrong name is refused here
        target.create(lineage.token_facts, files=["vocab.parquet"])
        target.add_files(["vocab.parquet"])  # the same table has other bytes under another pyarrow
        target.storage.send(target.path / "vocab.parquet")
    return maker


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens. Some tokenizers mark entries as special without naming a role for them."""
    marked = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *marked}


def _append(
    maker: TokenPartWriter, generation: Generation, done: dict[int, PartRecord], forgotten: ForgottenHashes, bar: Bar
) -> tuple[list[PartRecord], Ledger]:
    """Make parts of the documents that no published part holds. Parts that a killed run has finished are kept."""
    ledger = Ledger.read(maker.target, generation, forgotten)
    for part in generation.parts:
        maker.advance(part)
    stream = maker.open_corpus(ledger)
    parts: list[PartRecord] = []
    while True:
        index = len(generation.parts) + len(parts)
        record, stream = _kept(maker, done.get(index), stream)
        if record is None:
            tokenised = list(maker.take(stream))
            if not tokenised:
                return parts, ledger
            record = maker.write(index, tokenised)
        maker.advance(record)
        bar.advance(record.counts["n_tokens"])
        parts.append(record)


def _kept(
    maker: TokenPartWriter, record: PartRecord | None, stream: Iterator[Entry]
) -> tuple[PartRecord | None, Iterator[Entry]]:
    """Return the record if it holds just the documents that come next; they are then taken from the stream."""
    if record is None or record.counts["first_sequence"] != maker.n_sequences:
        return None, stream
    taken = list(itertools.islice(stream, record.counts["n_documents"]))
    table = pq.read_table(maker.target.part_file(record, "documents.parquet"), columns=["key", "content_hash"])
    if [(e.key, e.document.content_hash) for e in taken] == list(zip(*table.to_pydict().values(), strict=True)):
        return record, stream
    return None, itertools.chain(taken, stream)


def _restored(
    maker: TokenPartWriter, lost: list[PartRecord], generation: Generation, forgotten: ForgottenHashes, bar: Bar
) -> dict[int, PartRecord]:
    """Rebuild lost parts from the documents that no other part holds. Raises UserError if those have changed."""
    if not lost:
        return {}
    made = {}
    gone = {part.index for part in lost}
    intact = tuple(part for part in generation.parts if part.index not in gone)
    hidden = {index: documents for index, documents in generation.hidden.items() if index not in gone}
    held = {each.key_hash for index in gone for each in generation.hidden.get(index, ())}
    stream = maker.open_corpus(
        Ledger.read(maker.target, Generation(generation.number, intact, hidden), forgotten, held)
    )
    for part in lost:
        maker.n_sequences, maker.n_documents = part.counts["first_sequence"], part.counts["first_document"]
        entries = list(itertools.islice(stream, part.counts["n_documents"]))
        made[part.index] = maker.write(part.index, list(maker.tokenised(entries)), like=part)
        if (made[part.index].counts, made[part.index].files) != (part.counts, part.files):
            raise UserError(
                f"Part {part.index} of {maker.target.id} is damaged, and the corpus no longer gives the documents it "
                f"held.\nBring the corpus back as it was, restore {maker.target.part_path(part)} from a backup, "
                "or use another recipe name."
            )
        bar.advance(part.counts["n_tokens"])
    maker.n_sequences = maker.n_documents = 0
    return made


def count_visible(source: Artefact) -> dict[str, int]:
    """Return the number of documents and tokens that are not hidden."""
    generation = source.published()
    n_tokens = generation.total("n_tokens")
    for part in generation.parts:
        ids = pa.array([document.document_id for document in generation.hidden.get(part.index, ())], pa.int64())
        if len(ids):
            table = pq.read_table(source.part_file(part, "documents.parquet"), columns=["document_id", "n_tokens"])
            hidden = table.filter(pc.is_in(table.column("document_id"), ids))
            n_tokens -= pc.sum(hidden.column("n_tokens")).as_py() or 0
    return {"n_documents": generation.total("n_documents") - len(generation.hidden_ids), "n_tokens": n_tokens}
