"""A survey of a corpus: its lengths, and a sample of its pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from saeflow.corpus import sources
from saeflow.corpus.document import is_held_out
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress

_MORE_PIECES, _PIECE_CHARACTERS = 256, 4000
"""Pieces of text in the sample, drawn as if the corpus were cut into pieces of this length."""


@dataclass(frozen=True)
class Survey:
    """The corpus by its lengths: documents, characters (ids where it is tokenised), those held out, and the sample."""

    n_documents: int
    n_characters: int
    n_held_out: int
    pieces: tuple[str | tuple[int, ...], ...]


def survey(recipe: Recipe, progress: Progress) -> Survey:
    """Read the corpus once, for its lengths and a sample (reservoir: Vitter 1985, algorithm R)."""
    if recipe.model is None or recipe.corpus is None:
        raise UserError(
            "saeflow plan forecasts recipes that run a model. A table of activations is stored as it is: "
            "its rows × its columns × 2 bytes in float16. Run it: saeflow run RECIPE"
        )
    dice, about = random.Random(0), recipe.corpus
    pieces: list[str | tuple[int, ...]] = []
    n_documents = n_characters = n_held_out = n_pieces = 0
    with progress.bar("survey", None, "characters") as bar:
        for document in sources.open_corpus(about).documents:
            n_documents += 1
            n_characters += len(document.content)
            n_held_out += len(document.content) * is_held_out(document.key, about.seed, about.held_out)
            for piece in _cut(document.content):
                n_pieces += 1
                place = len(pieces) if len(pieces) < _MORE_PIECES else dice.randrange(n_pieces)
                pieces[place : place + 1] = [piece] if place < _MORE_PIECES else pieces[place : place + 1]
            bar.advance(len(document.content))
    if not pieces:
        raise UserError("All documents of the corpus are empty. Check corpus.text, the column that holds the text.")
    dice.shuffle(pieces)  # a small corpus fills the reservoir in its own order
    return Survey(n_documents, n_characters, n_held_out, tuple(pieces))


def _cut(content: str | tuple[int, ...]) -> Iterator[str | tuple[int, ...]]:
    length = _PIECE_CHARACTERS if isinstance(content, str) else _PIECE_CHARACTERS // 4
    for start in range(0, len(content), length):
        yield content[start : start + length]
