"""Tokens shaded by value, and text of a corpus as a page may show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from saeflow.runtime.text import brief, sanitise

SHADES = 9
"""Classes of the style sheet: v1 (weak) to v9 (strong), and n1 to n9 for values below zero."""

LONGEST_PIECE = 200
"""Characters of a token that a page shows; its JSON has all."""


LONGEST_SIDE = 500
"""Characters on either side of a token that are shown where a context is one text."""


@dataclass(frozen=True)
class ShadedToken:
    """A token as a page shows it."""

    text: str
    value: float
    shade: str
    """A class of the style sheet; empty if the feature is silent here."""
    is_centre: bool = False
    token_id: int = 0


def shade_of(value: float, strongest: float) -> str:
    """Return the class of a value, by its share of the strongest value's magnitude."""
    if not value or not strongest:
        return ""
    step = min(SHADES, 1 + int(SHADES * abs(value) / abs(strongest)))
    return f"{'v' if value > 0 else 'n'}{step}"


def shaded(row: Mapping[str, Any], strongest: float | None = None) -> list[ShadedToken]:
    """Return the tokens of a row with `pieces`, `place` (from 1) and `token_id` of the centre.

    Without `feature_values` all tokens are silent.
    """
    values: Sequence[float] = row.get("feature_values") or [0.0] * len(row["pieces"])
    top = strongest or max(map(abs, values), default=0.0)
    first = row["token_id"] - row["place"] + 1
    return [
        ShadedToken(shown_text(piece), value, shade_of(value, top), place == row["place"] - 1, first + place)
        for place, (piece, value) in enumerate(zip(row["pieces"], values, strict=True))
    ]


def marked_html(row: Mapping[str, Any], strongest: float | None = None) -> Markup:
    """Return a context as HTML: a mark for each token with a value and for the centre, which says its value.

    Silent tokens between them are plain text, so that a page stays short: `data-lengths` says where each of them ends,
    so that the page's script can choose any token. The style sheet hides or shows line breaks.
    """
    tokens, has_values = shaded(row, strongest), "feature_values" in row
    html = "".join(
        f'<mark class="{token.shade}{" c" * token.is_centre}" tabindex="0">{lines(token.text)}'
        f"{f'<i> {number(token.value)}</i>' if has_values else ''}</mark>"
        if token.value or token.is_centre
        else lines(token.text)
        for token in tokens
    )
    lengths = " ".join("m" if token.value or token.is_centre else str(utf16_length(token.text)) for token in tokens)
    return Markup(f'<bdi data-first="{tokens[0].token_id}" data-lengths="{lengths}">{html}</bdi>')


def utf16_length(text: str) -> int:
    """Return how long JavaScript finds a text."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def linked(rows: Sequence[Mapping[str, Any]], address: str, name: str = "token_id") -> Markup:
    """Return tokens of a text as HTML, shaded by `value`, or by `n_features` if no row has a value.

    Each is a link: `address`, then the column `name`.
    """
    by = "value" if any(row["value"] is not None for row in rows) else "n_features"
    strongest = max((abs(row[by] or 0) for row in rows), default=0)
    anchor = ' id="t{}"' if name == "token_id" else ""
    html = "".join(
        f'<a{anchor.format(row[name])} class="{shade_of(row[by] or 0, strongest)}" href="{escape(address)}{row[name]}">'
        f"{lines(shown_text(row['piece']))}{f'<i> {number(row[by])}</i>' if row[by] else ''}</a>"
        for row in rows
    ).replace(' class=""', "")
    return Markup("<bdi>") + Markup(html) + Markup("</bdi>")


def lines(text: str) -> Markup:
    """Return shown text as HTML, with a break after each ↵."""
    return Markup(escape(text).replace("↵", Markup("↵<br>")))


def around_token(context: str) -> Markup:
    """Return a text that marks its token as «token» as HTML, cut on both sides."""
    before, _, rest = context.partition("«")
    token, _, after = rest.partition("»")
    cut = (before[-LONGEST_SIDE:], brief(token, LONGEST_PIECE), after[:LONGEST_SIDE])
    before, token, after = (lines(sanitise(text)) for text in cut)
    return Markup('<bdi>{}<mark class="c">{}</mark>{}</bdi>').format(before, token, after)


def piece(text: object) -> Markup:
    """Return a vocabulary entry as HTML."""
    return Markup('<bdi class="piece">{}</bdi>').format(shown_piece(text))


def shown_piece(text: object) -> str:
    """Return a vocabulary entry with the spaces at its ends made visible."""
    whole = shown_text(text)
    inner = whole.strip(" ")
    before = len(whole) - len(whole.lstrip(" "))
    return "␣" * before + inner + "␣" * (len(whole) - before - len(inner))


def shown_text(text: object) -> str:
    """Return a text of the corpus on one line, with control and direction characters made visible."""
    return sanitise(brief(str(text), LONGEST_PIECE))


def shown_html(text: object) -> Markup:
    """Return a text of the corpus as HTML. Its direction of writing does not reach out of it."""
    return Markup("<bdi>") + escape(shown_text(text)) + Markup("</bdi>")


def number(value: object) -> str:
    """Return a number for a person: whole ones with separators, others with four significant digits."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return shown_text(value)


def per_cent(value: float | None, digits: int = 3) -> str:
    """Return a share for a person, in per cent."""
    return "–" if value is None else f"{float(f'{100 * value:.{digits}g}'):g}%"
