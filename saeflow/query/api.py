"""Questions from Python: `saeflow.open` gives a run whose answers are Arrow tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import duckdb
import pyarrow as pa

from saeflow.query.ask import ask, query, resolve_names, strengths_of
from saeflow.query.connection import connect_to_run
from saeflow.query.files.cost import Cost, Spent, Watch
from saeflow.query.generations import generations, opened_at
from saeflow.query.new_text import model_settings
from saeflow.query.outside.supply import supply
from saeflow.query.questions import Question, find_question, name_arguments, parse_arguments, questions
from saeflow.query.runs import Run
from saeflow.store.store import Store, store_path

if TYPE_CHECKING:
    from torch import nn

    from saeflow.recipe.data_settings import ModelConfig
    from saeflow.sae.autoencoder import SparseAutoencoder


class OpenRun:
    """A run of a store that can be asked. Close it, or use it in a `with` block. Use it from one thread at a time.

    Answers are `pyarrow.Table`s, with no Python object for a row; `.to_pandas()` and `polars.from_arrow(table)` convert
    them. An answer of `sql` lies in DuckDB's own memory. An answer of `ask` is copied once inside DuckDB, which is
    quicker than planning a short statement twice.
    """

    def __init__(
        self, store: Store, run: Run, connection: duckdb.DuckDBPyConnection, connecting: Spent, state: object
    ) -> None:
        self.store, self._run, self._connection, self._connecting = store, run, connection, connecting
        self._state = state

    @classmethod
    def open(
        cls,
        store: str | os.PathLike[str] | None = None,
        run: str | None = None,
        *,
        memory_limit: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Return the run of this name, or the newest, of a store (folder or URL).

        The default store is SAEFLOW_STORE if that is set, else data/store. `memory_limit` ("2GB") and `threads` are
        settings of DuckDB. Raises UserError if there is no such store or run.
        """
        watch = Watch()
        opened = Store.open(store_path(None if store is None else os.fspath(store)))
        state = generations(opened)
        found, connection = connect_to_run(opened, run, memory_limit, threads)
        return cls(opened, found, connection, watch.spent(opened.storage), state)

    @property
    def name(self) -> str:
        """The run's name in SQL: its schema."""
        return self._run.schema

    @property
    def n_features(self) -> int | None:
        return self._run.shape.get("n_features")

    @property
    def n_tokens(self) -> int | None:
        return self._run.n_tokens

    def ask(self, question: str, *arguments: object, limit: int | None = None, **named: object) -> pa.Table:
        """Answer a named question. Give its parameters by position, by name, or both; lists are Python lists.

            run.ask("top_tokens", feature=12, n=5)
            run.ask("tokens_where", 12, 0.5)
            run.ask("features_of_text", "a text that is nowhere in the corpus")  # runs the model
            run.ask("features_of_selection", sql="select token_id from tokens where piece = ' he'")

        Raises UserError for a question, parameter, feature, source or run that does not exist.
        """
        return self._answered(find_question(question), arguments, named, limit)[1]

    def explain(
        self, question: str, *arguments: object, limit: int | None = None, **named: object
    ) -> tuple[pa.Table, Cost]:
        """Answer a question as `ask` does, and say what the answer cost: files, requests, bytes and seconds."""
        watch = Watch(self.store.storage)
        values, answer = self._answered(find_question(question), arguments, named, limit)
        asking = watch.spent(self.store.storage)
        return answer, Cost.of(self._run, question, values, answer, self._connecting, asking)

    def _answered(
        self, question: Question, arguments: Sequence[object], named: Mapping[str, object], limit: int | None
    ) -> tuple[dict[str, Any], pa.Table]:
        values = parse_arguments(question, name_arguments(question, arguments, named))
        with opened_at(self.store, self._state):
            values = resolve_names(self._connection, question, values)
            readings = supply(self.store, self._run, self._connection, question, values)
            return values, ask(self._connection, question.name, values, limit, readings, self._run)

    def sql(self, statement: str, parameters: Sequence[object] = (), limit: int | None = None) -> pa.Table:
        """Run one statement that only reads. Each `?` in it stands for one of the parameters. Raises UserError."""
        with opened_at(self.store, self._state):
            return query(self._connection, statement, parameters, limit)

    def questions(self) -> list[Question]:
        """Return the questions that can be asked: their names, parameters, and what each answers."""
        return questions()

    @cached_property
    def sae(self) -> SparseAutoencoder:
        """The run's autoencoder, a `torch.nn.Module` that encodes and decodes. Loads PyTorch."""
        from saeflow.sae.formats.load import load_sae

        return load_sae(self.store.input_of(self._run.artefact, "saes").fetched())

    def model(self, path: str = "") -> Any:
        """Load the run's language model, a Hugging Face model in eval mode; each call loads one.

        `path` is its folder, if it was moved. Raises UserError if its files are not those that gave the activations.
        """
        from saeflow.model.load import load_model

        return load_model(self._model_settings(path))

    def tokenizer(self, path: str = "") -> Any:
        """Load the tokenizer of the run's language model, a Hugging Face tokenizer."""
        from saeflow.model.load import load_tokenizer

        return load_tokenizer(self._model_settings(path))

    def _model_settings(self, path: str) -> ModelConfig:
        activations = self.store.input_of(self._run.artefact, "activations")
        return model_settings(activations, path, "run.model(FOLDER)")

    @contextlib.contextmanager
    def spliced(self, changes: Mapping[int, float | str], model: nn.Module) -> Iterator[nn.Module]:
        """While open, features of the model have other values at every token that the run encodes.

            model = run.model()
            with run.spliced({12: "3x", 40: 0}, model):
                model.generate(...)

        A value is a number in the units of the feature's values, or text: `3x` (of its maximum), `mean`, `zero`,
        `same`. Everything else at the site stays as it is, what the SAE misses too. Gives the model. Raises UserError
        for a feature or value that there is not.
        """
        from saeflow.features.changes import FeatureChange
        from saeflow.features.splice import SplicePlace, spliced_features

        strengths = strengths_of(self._connection, self._run, [*changes])
        values = {
            feature: FeatureChange.parse(value, f"The change of feature {feature}").new_value(levels)
            for (feature, value), levels in zip(changes.items(), strengths.levels, strict=True)
        }
        place = SplicePlace.of_run(self.store, self._run.artefact, self.sae)
        with spliced_features(model, self.sae, place, values):
            yield model

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = [f"{n:,} {what}" for n, what in ((self.n_features, "features"), (self.n_tokens, "tokens")) if n]
        return f"<saeflow run {self.name!r} of {self.store.name!r}{': ' if counts else ''}{', '.join(counts)}>"
