"""The saved questions with a form each, any of them with its SQL, and what every word and number on the pages means."""

from __future__ import annotations

from collections.abc import Iterable

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import Connections, OpenedRun
from saeflow.browser.panels import MOST_IN_A_FILE, MOST_ROWS, Panel
from saeflow.query.questions import GROUPS, Question, find_question, questions


def page(asked: Asked, opened: OpenedRun) -> Page:
    """Return the page of all questions that can be asked of the run."""
    data = {"questions": [{"name": each.name, "answers": each.answers, "usage": each.usage} for each in questions()]}
    return Page("questions.html", "Questions", (), opened.run.schema, {"groups": by_group(questions()), "data": data})


def one(asked: Asked, opened: OpenedRun) -> Page:
    """Return the page of one question: its definitions, its SQL with the values, and the rows. SQL links lead here."""
    question = find_question(asked.path["question"])
    arguments = {name: value for name, value in asked.query.items() if value != ""}
    most_rows = MOST_IN_A_FILE if asked.format else MOST_ROWS
    answer = Panel("rows", question.answers, question.name, arguments, most_rows=most_rows).ask(opened)
    return Page("question.html", question.name, [answer], opened.run.schema, {"question": question})


def about(asked: Asked, connections: Connections) -> Page:
    """Return the page of definitions. It needs no run."""
    words = [{name: getattr(each, name) for name in ("name", "answers", "grain", "units")} for each in questions()]
    return Page("about.html", "About", more={"groups": by_group(questions()), "data": {"definitions": words}})


def by_group(every: Iterable[Question]) -> dict[str, list[Question]]:
    """Return questions by group, in the order of the groups."""
    found: dict[str, list[Question]] = {title: [] for title in GROUPS}
    for question in every:
        found[question.group].append(question)
    return {title: members for title, members in found.items() if members}
