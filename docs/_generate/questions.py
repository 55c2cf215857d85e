"""The reference of the questions: the headers of `sql/marts` and `sql/checks`."""

from __future__ import annotations

import re

from _generate import ROOT, code, table
from saeflow.query.questions import GROUPS, Question, questions


def page() -> str:
    groups = {title: [each for each in questions() if each.group == title] for title in GROUPS}
    found = {title: members for title, members in groups.items() if members}
    rows = [(f"[`{_call(each)}`](#{each.name})", each.answers) for members in found.values() for each in members]
    parts = [table(["question", "answers"], rows)]
    for title, members in found.items():
        parts += [f"## {title}", *map(_question, members)]
    return "\n\n".join(parts)


def _call(question: Question) -> str:
    names = ", ".join(parameter.name for parameter in question.parameters)
    return f"{question.name}({names})" if names else question.name


def _question(question: Question) -> str:
    parameters = "; ".join(code(str(parameter)) for parameter in question.parameters)
    rows = [
        ("Ask it", code(question.command)),
        ("For example", question.example),
        ("Parameters", parameters or "none"),
        ("One row is", question.grain.removeprefix("one row ")),
        ("Units", question.units),
    ]
    shown = [f"**{name}**: {text}" for name, text in rows if text]
    return f"### {question.name} {{ #{question.name} }}\n\n{question.answers}\n\n" + "\n\n".join(shown)


def checks() -> str:
    """Name and first line of every check."""
    rows = []
    for path in sorted((ROOT / "sql" / "checks").glob("*.sql")):
        lines = re.findall(r"^-- ?(.*)", path.read_text("utf-8").partition("\n\n")[0], re.MULTILINE)
        rows.append((code(path.stem), " ".join(" ".join(lines).partition("Grain:")[0].split())))
    return table(["check", "promise"], rows)
