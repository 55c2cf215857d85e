"""Which tensor of an engine's file is which site: by name, or by its place in the residual stream.

vLLM numbers the residual stream as it enters a layer: 0 is the embedding, 1 what layer 0 gives and layer 1 takes, and
the number of layers is what the last one gives, before the final norm. TransformerLens' `resid_pre` and `resid_post`,
and nnterp's `layers_input` and `layers_output`, are places in the same stream.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from saeflow.model.hook_names import site_of_hook
from saeflow.model.sites import Site
from saeflow.runtime.errors import UserError
from saeflow.runtime.text import brief, nearest

Place = int | str
"""A number of the residual stream, as vLLM counts, or the name of another module."""

_STACK = r"(?:[A-Za-z_]+\.)*(?:layers|layer|h|blocks|block)"
"""The list of a model's layers: the last word of its name, with no number before it."""
_OUTPUT = re.compile(rf"{_STACK}\.(\d+)|blocks\.(\d+)\.hook_resid_post|layers_output\W?(\d+)\W?")
_INPUT = re.compile(rf"{_STACK}\.(\d+):input|blocks\.(\d+)\.hook_resid_pre|layers_input\W?(\d+)\W?")
_SITE_ENDINGS = {".output.0": "", ".output": "", ".inputs.0.0": ":input", ".input": ":input"}
"""What nnsight adds to a module's name."""
_ALLOWED = re.compile(r"[\w.:\-\[\]]+")


def place_of(name: str, model: Sequence[str] = ()) -> Place:
    """Return the place that a tensor or a site of this name has. `model` are the names of its sites, if known."""
    for ending, side in _SITE_ENDINGS.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + side
            break
    for pattern, before in ((_OUTPUT, 1), (_INPUT, 0)):
        if found := pattern.fullmatch(name):
            return int(next(filter(None, found.groups()))) + before
    return name if name in model else site_of_hook(name, model) or name


def sites_of(patterns: Sequence[str], widths: Mapping[Place, int], model: Sequence[str] = ()) -> list[Site]:
    """Return the sites of dotted names or globs, by layer. Raises UserError for one that the files do not hold.

    `model` are the names of its sites, if they are known: other programs' names are then translated.
    """
    chosen: dict[str, int] = {}
    for pattern in (site_of_hook(each, model) or each for each in patterns):
        wants_input = pattern.endswith(":input")
        known = {name: place for name, place in _names(pattern, widths) if name.endswith(":input") == wants_input}
        names = fnmatch.filter(known, pattern)
        if not names:
            raise UserError(
                f"activations.sites: the files of corpus.requests have no site {brief(repr(pattern))}. They hold: "
                f"{places_in_words(widths)}.\n{_advice(pattern, known)}"
            )
        chosen |= {name: widths[known[name]] for name in names}
    return [Site(name, chosen[name]) for name in sorted(chosen, key=_by_layer)]


def _names(pattern: str, widths: Iterable[Place]) -> Iterable[tuple[str, Place]]:
    """Yield the names that the places have in the model that a pattern speaks of."""
    plain = pattern.removesuffix(":input")
    stack = plain.rpartition(".")[0]
    for place in widths:
        if isinstance(place, str):
            if _ALLOWED.fullmatch(place):
                yield place, place
        elif re.fullmatch(_STACK, stack):
            yield f"{stack}.{place}:input", place
            if place:
                yield f"{stack}.{place - 1}", place
        elif isinstance(place_of(pattern), int) and place == place_of(pattern):
            yield pattern, place


def places_in_words(widths: Iterable[Place]) -> str:
    """Return what files hold, for people."""
    layers = sorted(place for place in widths if isinstance(place, int))
    others = sorted(place for place in widths if isinstance(place, str))
    said = [f"the output of layer {place - 1}" if place else "the input of layer 0" for place in layers]
    said += [brief(name) for name in others]
    return ", ".join(said[:8]) + (", …" if len(said) > 8 else "") if said else "no activations"


def _advice(pattern: str, known: Iterable[str]) -> str:
    if near := nearest(pattern, list(known)):
        return f"Nearest: {', '.join(near)}."
    return "Name a layer as the model does, such as model.layers.6 for its output, or a name that the files have."


def _by_layer(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"(\d+)", name)]
