"""A page as a tree of elements, read by Python's own HTML parser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"br", "input", "link", "meta", "hr", "img"}
CLOSED_BY = {
    "td": {"td", "th", "tr", "tbody"}, "th": {"td", "th", "tr", "tbody"}, "tr": {"tr", "tbody"}, "li": {"li"},
    "thead": {"tbody"}, "dt": {"dd", "dt"}, "dd": {"dd", "dt"}, "option": {"option"},
}  # fmt: skip
"""Elements that end where one of these begins, because HTML lets their own end be left out."""


@dataclass
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(each if isinstance(each, str) else each.text for each in self.children)

    @property
    def words(self) -> str:
        """The text without the spaces at its ends."""
        return self.text.strip(" \n")

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def within(self) -> Iterator[Element]:
        """Every element inside, in the order of the page."""
        for each in self.children:
            if isinstance(each, Element):
                yield each
                yield from each.within()

    def all(self, what: str) -> list[Element]:
        """Elements inside that fit `tag`, `.class`, `tag.class` or `#id`."""
        tag, _, name = what.partition(".")
        if what.startswith("#"):
            return [each for each in self.within() if each.attributes.get("id") == what[1:]]
        return [each for each in self.within() if tag in ("", each.tag) and (not name or name in each.classes)]

    def one(self, what: str) -> Element:
        found = self.all(what)
        assert len(found) == 1, f"{len(found)} elements fit {what}"
        return found[0]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        while tag in CLOSED_BY.get(self.open[-1].tag, ()):
            self.open.pop()
        made = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1].tag in CLOSED_BY and self.open[-1].tag != tag:
            self.open.pop()
        assert self.open[-1].tag == tag, f"<{self.open[-1].tag}> is ended by </{tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(html: str) -> Element:
    """Return the page. Raises AssertionError if its elements are not inside one another."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    assert [each.tag for each in builder.open] == ["page"], "an element is not ended"
    return builder.open[0]
