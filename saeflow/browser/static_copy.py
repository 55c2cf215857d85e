"""A page as a file of a folder: links that lead to a file, and no forms, which only a server answers."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping
from html import escape
from html.parser import HTMLParser
from typing import Any

from saeflow.browser import charts

_FILE_ENDINGS = (".json", ".csv", ".parquet")
CONTROLS = ("button", "datalist", "fieldset", "input", "label", "select", "textarea")
WITHOUT_END = ("input",)


Rows = Callable[[str, str], list[dict[str, Any]]]
"""Returns the rows that a chart would fetch: those at a place inside the JSON of an address."""


def static_copy(html: str, here: str, files: Mapping[str, str], rows_at: Rows | None = None) -> str:
    """Return a page as the file `here`. `files` are names of files in the folder by address.

    A link to a page that is not in the folder becomes plain text; in the navigation, or to a format, it goes. Of a
    form, the contents stay without the controls.
    """
    writer = _Writer(here, files, rows_at)
    writer.feed(html)
    writer.close()
    return "".join(writer.written)


class _Writer(HTMLParser):
    """Writes what it reads, tag by tag. The pages are our own: every tag is closed, every value quoted."""

    def __init__(self, here: str, files: Mapping[str, str], rows_at: Rows | None) -> None:
        super().__init__(convert_charrefs=False)
        self.here, self.files, self.rows_at = here, files, rows_at
        self.written: list[str] = []
        self._links: list[str] = []
        """Tags that open links were written as; empty for one that is left out."""
        self._left_out = 0
        """Elements around this place that are left out."""
        self._in_navigation = self._in_form = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in CONTROLS and self._in_form:
            self._left_out += tag not in WITHOUT_END
        elif tag == "a":
            self._open_link(given)
        elif tag == "form":
            self._in_form = True
            self._write(_tag("div", {"class": given["class"]} if "class" in given else {}))
        else:
            self._in_navigation |= tag == "nav"
            leads = {name: self._file(given[name] or "") for name in ("href", "src") if name in given}
            self._write(_tag(tag, given | leads) if given != given | leads else str(self.get_starttag_text()))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)  # an end of its own would be one too many

    def _open_link(self, given: dict[str, str | None]) -> None:
        address = given.get("href") or ""
        file = self._file(address)
        goes = self._in_navigation or "rel" in given or address.partition("?")[0].endswith(_FILE_ENDINGS)
        written = "a" if file is not None else "" if goes else "span"
        self._links.append(written)
        self._left_out += not written
        shown = {"href": file} if file is not None else {}
        kept = {
            name: value for name, value in given.items() if name != "href" and (file is not None or name == "class")
        }
        self._write(_tag(written, shown | kept))

    def handle_endtag(self, tag: str) -> None:
        if tag in CONTROLS and self._in_form:
            self._left_out -= tag not in WITHOUT_END
        elif tag == "a":
            written = self._links.pop()
            self._write(f"</{written}>")
            self._left_out -= not written
        else:
            self._in_navigation &= tag != "nav"
            self._in_form &= tag != "form"
            self._write(f"</{'div' if tag == 'form' else tag}>")

    def _file(self, address: str) -> str | None:
        """Return what leads from this file to the one of an address; None if there is none."""
        if address.startswith(("#", "data:")):
            return address
        path, sign, part = address.partition("#")
        file = self.files.get(path)
        if file is None or file.startswith("#"):
            return file
        return posixpath.relpath(file, posixpath.dirname(self.here) or ".") + sign + part

    def handle_data(self, data: str) -> None:
        fetches = self.cdata_elem == "script" and "url" in (spec := json.loads(data)).get("data", {})
        self._write(charts.as_script(self._with_rows(spec)) if fetches else data)

    def _with_rows(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Return a chart with its rows in it. Points of exported features lead to their files, others nowhere."""
        assert self.rows_at is not None, "a page whose charts fetch their rows"
        rows = self.rows_at(spec["data"]["url"], spec["data"]["format"]["property"])
        steps = [step for step in spec["transform"] if step.get("as") != "address"]
        for step in (step for step in spec["transform"] if step not in steps):
            run = json.loads(step["calculate"].rpartition(" + ")[0])
            rows = [row | {"address": self._file(f"{run}{row['feature_id']}")} for row in rows]
        return spec | {"data": {"name": "rows"}, "transform": steps, "datasets": {"rows": rows}}

    def handle_entityref(self, name: str) -> None:
        self._write(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._write(f"&#{name};")

    def handle_decl(self, decl: str) -> None:
        self._write(f"<!{decl}>")

    def _write(self, text: str) -> None:
        if not self._left_out:
            self.written.append(text)


def _tag(name: str, given: Mapping[str, str | None]) -> str:
    words = (f' {key}="{escape(value)}"' if value is not None else f" {key}" for key, value in given.items())
    return f"<{name}{''.join(words)}>"
