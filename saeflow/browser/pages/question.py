"""Any named question: its definitions, the SQL with its values filled in, and the rows. Every SQL link leads here."""

from __future__ import annotations

from saeflow.browser.address import Asked
from saeflow.browser.answers import Page
from saeflow.browser.connections import OpenedRun
from saeflow.browser.panels import MOST_IN_A_FILE, MOST_ROWS, Panel
from saeflow.query.questions import find_question


def page(asked: Asked, opened: OpenedRun) -> Page:
    question = find_question(asked.path["question"])
    arguments = {name: value for name, value in asked.query.items() if value != ""}
    most_rows = MOST_IN_A_FILE if asked.format else MOST_ROWS
    answer = Panel("rows", question.answers, question.name, arguments, most_rows=most_rows).ask(opened)
    return Page("question.html", question.name, [answer], opened.run.schema, {"question": question})
