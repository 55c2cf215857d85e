"""The features of a text that need not be in the corpus: the run's model and SAE read it now.

PyTorch and the model are loaded only if such a question is asked. The model that was asked last stays in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from saeflow.query.ask import Readings
from saeflow.query.questions import Question, Value
from saeflow.query.runs import Run
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief
from saeflow.store.artefact import Artefact
from saeflow.store.records import provenance_value
from saeflow.store.store import Store

if TYPE_CHECKING:
    import numpy as np

    from saeflow.activations.sparse_values import SparseValues
    from saeflow.corpus.token_parts import Frame
    from saeflow.recipe.data_settings import ModelConfig, TokensConfig

_ROWS_AT_ONCE = 16
"""Sequences of a long text in one forward pass."""


def read_if_needed(store: Store, run: Run, question: Question, values: Mapping[str, Value]) -> Readings | None:
    """Return what the model gives on the question's text; None if the question does not run it. Raises UserError."""
    if not question.runs_model:
        return None
    read = read_new_text(store, run, str(values["text"]), str(values["model"] or ""))
    return read.by_token(values["feature"]) if question.name == "text_tokens" else read.by_feature()


@dataclass(frozen=True)
class ReadText:
    """What a run's model and SAE see in the tokens of a text."""

    vocab_ids: np.ndarray
    """(n,)."""
    pieces: Sequence[str]
    """As the vocabulary spells the tokens."""
    letters: Sequence[str]
    """What of the text begins in each token: see `letters_of`."""
    counts: np.ndarray
    """True for tokens that no setting of the run skips, (n,)."""
    values: SparseValues
    """A row for each token that counts."""

    def by_token(self, feature: Value) -> Readings:
        """Return each token with the number of its features and the value of one; null where a setting skips it."""
        import numpy as np

        n_features, value = np.zeros(len(self.counts), int), np.zeros(len(self.counts))
        places, per_token = np.flatnonzero(self.counts), np.diff(self.values.row_starts)
        n_features[places] = per_token
        mine = self.values.feature_ids == feature
        value[np.repeat(places, per_token)[mine]] = self.values.values[mine]
        return [
            {
                "place": place, "vocab_id": int(self.vocab_ids[place]), "piece": self.letters[place],
                "value": float(value[place]) if counts and feature is not None else None,
                "n_features": int(n_features[place]) if counts else None,
            }
            for place, counts in enumerate(self.counts)
        ]  # fmt: skip

    def by_feature(self) -> Readings:
        """Return each feature that fires: on how many tokens, and where it is strongest."""
        import numpy as np

        sparse, pieces = self.values, list(compress(self.pieces, self.counts))
        rows = np.repeat(np.arange(len(pieces)), np.diff(sparse.row_starts))
        order = np.lexsort((rows, -np.abs(sparse.values.astype(np.float64)), sparse.feature_ids))
        features, first, counts = np.unique(sparse.feature_ids[order], return_index=True, return_counts=True)
        return [
            {
                "feature_id": int(feature), "n_tokens": int(n), "share": n / len(pieces),
                "max_value": float(sparse.values[order[i]]), "place": int(rows[order[i]]),
                "piece": pieces[rows[order[i]]],
            }
            for feature, i, n in zip(features, first, counts, strict=True)
        ]  # fmt: skip


_one_at_a_time = threading.Lock()
_kept: dict[object, _TextReader] = {}
"""The reader that was asked last."""


def read_new_text(store: Store, run: Run, text: str, model: str = "") -> ReadText:
    """Return what the model and the SAE see in the text.

    The text is read as a document of the run's corpus would be: with its special tokens, its context length, and
    without the tokens that the run skips. Memory is that of the model, the SAE and the values of the text; model and
    SAE stay until another run is asked.
    """
    config = model_settings(store.input_of(run.artefact, "activations"), model)
    key = (run.artefact.path, run.artefact.fp, config.path, config.revision, config.dtype)
    with _one_at_a_time:
        if key not in _kept:
            _kept.clear()  # two models need not fit into memory
            _kept[key] = _TextReader(store, run, config)
        return _kept[key].read(text)


_READS_TEXT = "features_of_text TEXT 20 MODEL_FOLDER"


def model_settings(stored: Artefact, given: str = "", remedy: str = _READS_TEXT) -> ModelConfig:
    """Return the model that gave the activations, wherever it lies now. Its files are compared with those of then.

    `given` is the model's folder, if the records name none or another. `remedy` is how a user names it.
    """
    from saeflow.model.load import model_fingerprint
    from saeflow.recipe.data_settings import ModelConfig

    wanted = stored.record.facts.get("model")
    if wanted is None:
        raise UserError(f"{remedy.split()[0]} runs a language model, but this run is of a table.")
    folder = stored.own_file("provenance.json").parent
    path, revision = given or provenance_value(folder, "model"), provenance_value(folder, "revision")
    if not path:
        raise UserError(f"The store does not say where its model lies. Name it: {remedy}.")
    is_gone = Path(path).is_absolute() and not Path(path).exists()  # else it would be looked for on the hub
    for dtype in () if is_gone else get_args(ModelConfig.model_fields["dtype"].annotation):
        config = ModelConfig(path=path, revision=None if given else revision, dtype=dtype)
        with contextlib.suppress(UserError):
            if model_fingerprint(config) == wanted:
                return config
    raise UserError(
        f"model is {brief(path)!r}, but the activations of this run are of other files, or it is not there.\n"
        f"Name the folder of that model: {remedy}."
    )


def tokens_settings(store: Store, run: Run) -> tuple[TokensConfig, Mapping[str, Any]]:
    """Return how a run's texts were cut into tokens, and all facts of its tokens."""
    from saeflow.recipe.data_settings import TokensConfig

    facts = store.input_of(run.artefact, "tokens").record.facts
    return TokensConfig(**{name: facts[name] for name in TokensConfig.model_fields if name in facts}), facts


class _TextReader:
    """A model and an SAE in memory, and what they saw in the last text."""

    def __init__(self, store: Store, run: Run, config: ModelConfig) -> None:
        import pyarrow.parquet as pq

        from saeflow.activations.shards import stored_sites
        from saeflow.corpus.selection import TokenSelection
        from saeflow.model.load import load_model, load_tokenizer
        from saeflow.model.sites import choose_site
        from saeflow.sae.formats.load import load_sae

        tokens, self.stored = store.input_of(run.artefact, "tokens"), store.input_of(run.artefact, "activations")
        self.about, facts = tokens_settings(store, run)
        self.tokenizer, self.model = load_tokenizer(config), load_model(config)
        self.frame = frame_then(self.tokenizer, facts, self.about)
        self.vocab = pq.read_table(tokens.own_file("vocab.parquet"), columns=["piece", "bytes"])
        self.site = choose_site(stored_sites(self.stored), run.artefact.fact("site"))
        self.selection = TokenSelection.from_facts(tokens, run.artefact.record.facts)
        self.sae = load_sae(store.input_of(run.artefact, "saes").fetched())
        self.last: tuple[str, ReadText] | None = None

    def read(self, text: str) -> ReadText:
        if self.last is None or self.last[0] != text:
            self.last = (text, self._read(text))
        return self.last[1]

    def _read(self, text: str) -> ReadText:
        import numpy as np
        import torch

        from saeflow.activations.lengths import longest_allowed, too_long
        from saeflow.corpus.token_parts import pack
        from saeflow.corpus.tokenise.texts import ids_of

        about, frame = self.about, self.frame
        plain = np.asarray(ids_of(self.tokenizer, [text], about)[0], np.int32)
        ids = plain if frame.in_each_sequence else frame.around(plain)
        pad = int(ids[-1]) if len(ids) else 0
        rows, owners, *_ = pack([(0, ids)], about.context_length, about.packing, pad, frame)
        values = self._activations(rows, owners >= 0)
        counts = owners >= 0
        for _, left_out in self.selection.reasons(rows):
            counts &= ~left_out
        dtype = getattr(torch, self.stored.fact("dtype"))
        counts &= ~too_long(values.to(dtype), longest_allowed(self.selection, self.stored, self.site))
        real = owners >= 0
        spelt = self.vocab.take(rows[real])
        return ReadText(
            rows[real],
            spelt["piece"].to_pylist(),
            letters_of(spelt["bytes"].to_pylist()),
            counts[real],
            self.sae.encode_sparse(values[torch.from_numpy(counts)]),
        )

    def _activations(self, rows: np.ndarray, real: np.ndarray) -> Any:
        """Return the activations (S, T, D) of sequences, as they would be stored."""
        import torch

        from saeflow.model.sites import SiteReader

        dtype = getattr(torch, self.stored.fact("dtype"))
        values = torch.empty(0, self.about.context_length, self.site.width)
        with contextlib.closing(SiteReader(self.model, [self.site])) as reader:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                here = slice(start, start + _ROWS_AT_ONCE)
                mask = torch.from_numpy(real[here])
                read = reader.read(torch.from_numpy(rows[here]), None if mask.all() else mask)
                values = torch.cat([values, read[self.site.name].to(dtype).float().cpu()])
        return values


def letters_of(pieces: Sequence[bytes]) -> list[str]:
    """Return what of the text begins in each piece: a letter of several pieces belongs to the one that begins it."""
    letters, begun = [""] * len(pieces), 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for place, piece in enumerate(pieces):
        for byte in piece:
            goes_on = byte & 0xC0 == 0x80 and decoder.getstate()[0]
            if not goes_on:
                letters[begun] += decoder.decode(b"", final=True)
                begun = place
            letters[begun] += decoder.decode(bytes([byte]))
    if pieces:
        letters[begun] += decoder.decode(b"", final=True)
    return letters


def frame_then(tokenizer: Any, facts: Mapping[str, Any], about: TokensConfig) -> Frame:
    """Return the special tokens around the documents of these tokens. An earlier saeflow added BOS alone."""
    from saeflow.corpus.token_parts import Frame, frame_of, special_tokens
    from saeflow.recipe.data_settings import CorpusConfig

    corpus = CorpusConfig.model_construct(token_ids=(facts.get("corpus") or {}).get("token_ids"))
    frame = frame_of(tokenizer, corpus, about)
    if facts.get("special_tokens") or not special_tokens(tokenizer):
        return frame
    return Frame(frame.before[:1] if frame.before[:1] == (tokenizer.bos_token_id,) else ())
