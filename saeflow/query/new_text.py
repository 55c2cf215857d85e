"""The features of a text that need not be in the corpus: the run's model and SAE read it now.

PyTorch and the model are loaded only if such a question is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
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
    return readings_of(store, run, str(values["text"]), str(values["model"] or ""))


def readings_of(store: Store, run: Run, text: str, model: str = "") -> Readings:
    """Return each feature that fires on the text: on how many tokens, and where it is strongest.

    The text is read as a document of the run's corpus would be: with its special tokens, its context length, and
    without the tokens that the run skips. Memory is that of the model, the SAE and the values of the text.
    """
    import pyarrow.parquet as pq

    from saeflow.recipe.data_settings import TokensConfig

    tokens, stored = store.input_of(run.artefact, "tokens"), store.input_of(run.artefact, "activations")
    config = _model_settings(stored, model)
    facts = tokens.record.facts
    about = TokensConfig(**{name: facts[name] for name in TokensConfig.model_fields if name in facts})
    vocab_ids, sparse = _values_of(store, run, stored, config, about, text)
    vocab = pq.read_table(tokens.own_file("vocab.parquet"), columns=["piece"]).column(0)
    return _by_feature(sparse, vocab.take(vocab_ids).to_pylist())


def _model_settings(stored: Artefact, given: str) -> ModelConfig:
    """Return the model that gave the activations, wherever it lies now. Its files are compared with those of then."""
    from saeflow.model.load import model_fingerprint
    from saeflow.recipe.data_settings import ModelConfig

    wanted = stored.record.facts.get("model")
    if wanted is None:
        raise UserError("features_of_text reads texts with a language model, but this run is of a table.")
    folder = stored.own_file("provenance.json").parent
    path, revision = given or provenance_value(folder, "model"), provenance_value(folder, "revision")
    if not path:
        raise UserError("The store does not say where its model lies. Name it: features_of_text TEXT 20 MODEL_FOLDER.")
    is_gone = Path(path).is_absolute() and not Path(path).exists()  # else it would be looked for on the hub
    for dtype in () if is_gone else get_args(ModelConfig.model_fields["dtype"].annotation):
        config = ModelConfig(path=path, revision=None if given else revision, dtype=dtype)
        with contextlib.suppress(UserError):
            if model_fingerprint(config) == wanted:
                return config
    raise UserError(
        f"model is {brief(path)!r}, but the activations of this run are of other files, or it is not there.\n"
        "Name the folder of that model: features_of_text TEXT 20 MODEL_FOLDER."
    )


def _values_of(
    store: Store, run: Run, stored: Artefact, config: ModelConfig, about: TokensConfig, text: str
) -> tuple[np.ndarray, SparseValues]:
    """Return the vocabulary ids (n,) of the tokens that count, and their values."""
    import numpy as np
    import torch

    from saeflow.activations.lengths import longest_allowed, too_long
    from saeflow.activations.shards import stored_sites
    from saeflow.corpus.selection import TokenSelection
    from saeflow.corpus.token_parts import pack
    from saeflow.corpus.tokenise.texts import ids_of
    from saeflow.model.load import load_model, load_tokenizer
    from saeflow.model.sites import SiteReader, choose_site
    from saeflow.sae.formats.load import load_sae

    tokenizer, model = load_tokenizer(config), load_model(config)
    frame = _frame_then(tokenizer, store.input_of(run.artefact, "tokens").record.facts, about)
    plain = np.asarray(ids_of(tokenizer, [text], about)[0], np.int32)
    ids = plain if frame.in_each_sequence else frame.around(plain)
    pad = int(ids[-1]) if len(ids) else 0
    rows, owners, *_ = pack([(0, ids)], about.context_length, about.packing, pad, frame)
    site = choose_site(stored_sites(stored), run.artefact.fact("site"))
    dtype = getattr(torch, stored.fact("dtype"))
    values = torch.empty(0, about.context_length, site.width)
    with contextlib.closing(SiteReader(model, [site])) as reader:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            here = slice(start, start + _ROWS_AT_ONCE)
            real = torch.from_numpy(owners[here] >= 0)
            read = reader.read(torch.from_numpy(rows[here]), None if real.all() else real)
            values = torch.cat([values, read[site.name].to(dtype).float().cpu()])
    used = owners >= 0
    selection = TokenSelection.from_facts(store.input_of(run.artefact, "tokens"), run.artefact.record.facts)
    for _, left_out in selection.reasons(rows):
        used &= ~left_out
    used &= ~too_long(values.to(dtype), longest_allowed(selection, stored, site))
    sae = load_sae(store.input_of(run.artefact, "saes").fetched())
    return rows[used], sae.encode_sparse(values[torch.from_numpy(used)])


def _frame_then(tokenizer: Any, facts: Mapping[str, Any], about: TokensConfig) -> Frame:
    """Return the special tokens around the documents of these tokens. An earlier saeflow added BOS alone."""
    from saeflow.corpus.token_parts import Frame, frame_of, special_tokens
    from saeflow.recipe.data_settings import CorpusConfig

    corpus = CorpusConfig.model_construct(token_ids=(facts.get("corpus") or {}).get("token_ids"))
    frame = frame_of(tokenizer, corpus, about)
    if facts.get("special_tokens") or not special_tokens(tokenizer):
        return frame
    return Frame(frame.before[:1] if frame.before[:1] == (tokenizer.bos_token_id,) else ())


def _by_feature(sparse: SparseValues, pieces: list[str]) -> Readings:
    import numpy as np

    places = np.repeat(np.arange(len(pieces)), np.diff(sparse.row_starts))
    order = np.lexsort((places, -np.abs(sparse.values.astype(np.float64)), sparse.feature_ids))
    features, first, counts = np.unique(sparse.feature_ids[order], return_index=True, return_counts=True)
    return [
        {
            "feature_id": int(feature), "n_tokens": int(n), "share": n / len(pieces),
            "max_value": float(sparse.values[order[i]]), "place": int(places[order[i]]),
            "piece": pieces[places[order[i]]],
        }
        for feature, i, n in zip(features, first, counts, strict=True)
    ]  # fmt: skip
