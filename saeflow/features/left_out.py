"""How many tokens a run leaves out, by reason, and which ones are too long."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saeflow.features.schema import LEFT_OUT_TABLE
from saeflow.store.artefact import Artefact

_REASONS_IN_WORDS = {
    "position": "at skipped positions",
    "special": "special tokens",
    "role": "of other roles, or of the chat template",
    "length": "with vectors that are too long",
}


def left_out_in_words(target: Artefact, source: Artefact) -> str:
    """Return how many tokens the published parts of a run leave out, and why; empty if no setting does."""
    parts = target.published().parts
    reasons = dict.fromkeys(name for part in parts for name in part.counts if name.startswith("n_left_out_by_"))
    counts = {name.removeprefix("n_left_out_by_"): target.published().total(name) for name in reasons}
    words = [f"{n:,} {_REASONS_IN_WORDS.get(reason, reason)}" for reason, n in counts.items()]
    if counts.get("length"):
        words[list(counts).index("length")] += f" (most often {_piece_left_out_most(target, source)})"
    return ", ".join(words)


def _piece_left_out_most(target: Artefact, source: Artefact) -> str:
    name = f"{next(iter(LEFT_OUT_TABLE))}.parquet"
    paths = [target.part_file(part, name) for part in target.published().parts if name in {f.name for f in part.files}]
    ids = pa.concat_tables([pq.read_table(path, columns=["vocab_id"]) for path in paths]).column("vocab_id")
    counted = sorted(pc.value_counts(ids).to_pylist(), key=lambda each: (-each["counts"], each["values"]))
    pieces = pq.read_table(source.own_file("vocab.parquet"), columns=["piece"]).column("piece")
    return ", ".join(f"{pieces[each['values']].as_py()!r}: {each['counts']:,}" for each in counted[:3])
