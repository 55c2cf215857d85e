"""No SQL is made from values: they travel as parameters, or as literals that one function writes.

A test reads the code. It finds every text that looks like SQL and is put together, and every statement handed to
DuckDB. What is put in must be `literal(...)`, `whole(...)` or `identifier(...)`, or stand in a list with a reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeflow.query.files.quoting import identifier, literal, whole
from saeflow.query.files.relations import condition_of_encoded, relations

ROOT = Path(__file__).resolve().parents[2]
_SQL = re.compile(
    r"(?i)\bselect\b|\bfrom (read|\()|^from |\bcreate (or|table|view|schema)"
    r"|\bdrop (view|table)|\bset (search_path|allowed)"
    r"|\bcopy\b.* to |\binsert into\b|\bbetween\b|\bnot in\b|\bin \(|::|read_parquet|read_csv|\bexplain \(|\bwhere\b"
    r"|\bunion all\b"
)
_MAKERS_OF_SQL = ("query/", "corpus/", "runtime/sql", "features/", "classes/", "cli/render", "activations/tables")
_TYPED = {"literal", "whole", "identifier"}

PUT_IN = {
    "classes/annotations.py": {
        "every": "made by places.islands, of names of columns in the code",
        "merged": "made by places.islands, of names of columns in the code",
        "counts": "a constant",
    },
    "classes/places.py": {
        "last": "a name of a column in the code",
        "_OWNED": "a constant",
        "rows": "a name or constant of the caller's code",
        "first": "a name of a column in the code",
        "same": "names of columns in the code",
        "merged": "made by islands, of names of columns in the code",
        "order": "made here, of names of columns in the code",
    },
    "classes/tables.py": {
        "path": "a literal",
        "written['class']": "an identifier",
        "written[name]": "an identifier",
        "given": "made here, of an identifier",
        "cell": "made here, of an identifier",
        "number": "made here, of an identifier",
        "' or '.join(unreadable)": "made here, of identifiers",
    },
    "query/ask.py": {
        "chosen.name": "the name of a file of sql/marts, looked up",
        "call": "as many question marks as there are parameters",
        "_READINGS": "a constant",
        "sql": "the same, to which a limit is added as a parameter",
    },
    "query/catalog.py": {
        "EVERY_RUN": "a constant",
        "view": "one of two names in the loop above",
        "side_by_side(schemas, view)": "identifiers and a literal",
        "schema": "identifier(run.schema)",
        "either": "names of files of sql/, of a regular expression",
        "found['tokens']": "SQL that relations has made, of literals",
        "chosen": "the same, and a literal",
        "run.skip_reason": "made by relations, of whole numbers",
    },
    "query/connection.py": {"schema": "identifier(run.schema)", "view": "a key of the constant KEPT"},
    "query/kept_catalog.py": {
        "_ATTACHED": "a constant",
        "options": "a constant or nothing",
        "kind": "one of two words in the loop above",
        "name": "a name in sql/sources.sql",
        "view": "a name in sql/sources.sql",
        "', '.join(rows)": "identifiers",
    },
    "query/labels.py": {
        "' union all '.join(map(_select_labels, files))": "the next function's",
        "_FEATURE_ID": "a constant",
        "_trimmed('feature_id')": "a constant",
        "label": "a constant around _trimmed",
        "rule": "a constant around _trimmed",
        "kind": "a constant",
        "figures": "what _number_in makes",
        "name": "a constant in the loop above",
        "column": "a constant of RULE_COLUMNS, or score",
        "number": "_trimmed of the same",
        "options": "made of literals",
        "_trimmed(column)": "a column's constant name",
        "_number_in(file, name)": "made of constants",
        "_number_in(file, 'score')": "made of constants",
        "_sql_rows(file)": "made of literals",
        "columns": "names of columns of a schema in the code",
        "no_rows(BESIDE_LABELS[table])": "a schema in the code",
        "' union all '.join(selected or [empty])": "made here, of literals",
    },
    "query/questions.py": {
        "self.name": "the name of a file of sql/marts",
        "self.type": "a type of the constant _IN_WORDS",
        "f'({given})' if self.is_macro else ''": "literals",
    },
    "query/files/chosen.py": {"_LISTS": "a constant"},
    "query/files/slices.py": {
        "rows": "of relations.py",
        "inside": "of whole numbers",
        "wanted": "made here, of whole numbers",
    },
    "query/files/relations.py": {
        "', '.join(map(literal, each.without))": "literals",
        "_read_files([each.location])": "literals",
        "shown": "of a literal",
        "gone": "of a literal",
        "marked": "made here, of literals",
        "masked": "made here, of literals",
        "touched": "made here, of literals",
        "emptied": "names of columns of a schema in the code",
        "_SQL_TYPES[kind]": "a constant",
        "name": "a name of a column of a schema in the code",
        "nothing": "made here, of constants",
        "relation": "_read_files of one file: literals",
        "_read_listed(lists.listed('tokens', marked))": "literals, or variables of the connection",
        "_read_listed(lists.listed('tokens', unmarked))": "literals, or variables of the connection",
        "tokens": "SQL that this file has made, of literals",
        "found['vocab_blocks']": "made here, of literals",
        "_blocks_of(f'(select * from {masked} where token_id // {BLOCK_TOKENS} in {touched})')": "of literals",
        "found['tokens']": "made here, of literals",
        "found['documents']": "made here, of literals",
        "found[table]": "made here, of literals",
        "condition": "made here, of literals",
        "listed": "a literal",
        "partitions": "one of two constants",
        "', ' + options if options else ''": "constants",
        "columns": "names of columns of a schema in the code",
        "column": "a name of a column in the code",
        "everywhere": "a constant",
        "low": "a constant regular expression",
        "high": "a constant regular expression",
        "_read_listed(lists.listed(order, others))": "literals, or variables of the connection",
        "_read_listed(listed)": "literals, or variables of the connection",
        "_read_listed(listed, _HIVE)": "literals, or variables of the connection",
        "_read_listed(lists.listed('vocab_blocks', paths))": "literals, or variables of the connection",
        "no_rows(SPANS)": "a schema in the code",
        "_read_files([path])": "literals",
        "no_rows(VALUES[order])": "a schema in the code",
        "_SQL_TYPES[field.type]": "a constant",
        "field.name": "a name of a schema in the code",
        "rows": "made here, of literals",
        "unseen": "of whole numbers",
        "BLOCK_TOKENS": "a constant",
        "view": "a name given by the caller's code",
        "', '.join(map(whole, positions))": "whole numbers",
        "', '.join(map(whole, entries))": "whole numbers",
    },
    "runtime/sql_judge.py": {"sql": "the user's own statement, after its parsed tree was judged"},
}

RUN = {
    "browser/pages/classes.py": {"_IS_PROBED": "a constant"},
    "classes/annotations.py": {"sql": "constants, and names of columns in the code"},
    "classes/characters.py": {"sql": "a constant"},
    "classes/places.py": {"sql": "a constant of this file", "statement": "one of the constant _TABLES"},
    "classes/probing.py": {"_SAMPLED_TOKENS if sampled else _ENCODED_TOKENS": "one of two constants of this file"},
    "classes/tables.py": {"sql": "a constant", "_sql_that_reads(file)": "a literal in one of two constants"},
    "query/ask.py": {"sql": "judged, or made of a question's name and question marks", "_LEVELS": "a constant"},
    "query/connection.py": {"sql": "a file of sql/checks", "statement": "what catalog.definitions yields"},
    "query/kept_catalog.py": {"statement": "what catalog.upon_sources yields"},
    "query/first_answers.py": {"_LARGEST_SOURCES": "a constant", "_STRIKING": "a constant"},
    "query/outside/approximation.py": {"sql": "one of two constants", "_SAMPLED": "a constant"},
    "cli/meaning/explain_by_model.py": {"_N_FEATURES": "a constant", "_LIVE_IDS": "a constant"},
    "meaning/language_model/command.py": {"sql": "one of two constants"},
    "meaning/language_model/examples.py": {
        **dict.fromkeys(("_LAST", "_STRONGEST", "_ENCODED", "_OWNERS"), "a constant"),
        "sql": "one of the constants at the top",
    },
    "meaning/effects/firings.py": {"_HOLES": "a constant", "_FIRED": "a constant"},
    "corpus/tabular.py": {"sql": "the recipe's own statement, after it was judged"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for top in ("saeflow", "flows"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield path.relative_to(ROOT / top).as_posix(), ast.parse(path.read_text("utf-8"))


def said(node: ast.AST) -> bool:
    """True for what people read: errors, logs and help."""
    name = node.func if isinstance(node, ast.Call) else None
    called = getattr(name, "attr", getattr(name, "id", ""))
    spoken = {
        "UserError",
        "warning",
        "info",
        "say",
        "print",
        "print_note",
        "print_line",
        "ValueError",
        "Option",
        "Field",
    }
    return isinstance(node, ast.Raise) or called in spoken


def spoken_about(tree: ast.AST) -> set[int]:
    return {id(inner) for node in ast.walk(tree) if said(node) for inner in ast.walk(node)}


def put_together(node: ast.AST) -> tuple[str, list[ast.expr]] | None:
    """Return the constant text of a string that is put together, and what is put in."""
    match node:
        case ast.JoinedStr(values=values):
            text = "".join(str(each.value) for each in values if isinstance(each, ast.Constant))
            return text, [each.value for each in values if isinstance(each, ast.FormattedValue)]
        case ast.BinOp(left=ast.Constant(value=str(text)), op=ast.Add() | ast.Mod(), right=other):
            return text, [other]
        case ast.BinOp(left=other, op=ast.Add(), right=ast.Constant(value=str(text))):
            return text, [other]
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="format"), args=args):
            return text, args
    return None


def is_typed(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Call) and getattr(node.func, "id", "") in _TYPED)


def test_what_is_put_into_sql_is_a_literal_of_one_function_or_in_a_list_with_its_reason():
    wrong = []
    for name, tree in modules():
        if not name.startswith(_MAKERS_OF_SQL):
            continue
        spoken = spoken_about(tree)
        for node in ast.walk(tree):
            made = put_together(node)
            if made and _SQL.search(made[0]) and id(node) not in spoken:
                pieces = {ast.unparse(each) for each in made[1] if not is_typed(each)}
                wrong += [f"{name}: {each}" for each in sorted(pieces - PUT_IN.get(name, {}).keys())]
    assert wrong == []


def test_what_duckdb_runs_is_a_constant_or_in_a_list_with_its_reason():
    wrong = []
    for name, tree in modules():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr="execute" | "sql" | "executemany"), args=[first, *_]):
                    is_made = isinstance(first, ast.Constant | ast.JoinedStr)  # the test above looks into the latter
                    if not is_made and ast.unparse(first) not in RUN.get(name, {}):
                        wrong.append(f"{name}:{node.lineno}: {ast.unparse(first)}")
    assert wrong == []


def test_no_entry_of_the_lists_is_left_over():
    texts = {name: ast.unparse(tree) for name, tree in modules()}
    for listed in (PUT_IN, RUN):
        for name, reasons in listed.items():
            assert all(expression in texts[name] for expression in reasons), name
            assert all(reasons.values())


EVIL = "0)); COPY (select 1) TO '/tmp/x'; --"


@pytest.mark.parametrize("value", [EVIL, "1", 1.0, None, [1], {"a": 1}])
def test_what_is_no_whole_number_never_becomes_one_in_sql(value):
    with pytest.raises(TypeError):
        whole(value)
    with pytest.raises(TypeError):
        condition_of_encoded([(0, value)], 4)
    with pytest.raises(TypeError):
        condition_of_encoded(None, 4, [value])
    with pytest.raises(TypeError):
        condition_of_encoded(None, 4, (), [value])
    with pytest.raises(TypeError):
        condition_of_encoded(None, value, [1])
    with pytest.raises(TypeError):
        relations(
            {table: ["a"] for table in ("tokens", "documents", "vocab", "feature_major", "token_major")}, [(0, value)]
        )


@pytest.mark.parametrize("text", [EVIL, "'; drop table t; --", '"', "\\'", "a\nb", "\x1b]0;x\x07", "$1 ?", "E'x'"])
def test_text_stays_text_as_a_literal_and_a_name_stays_a_name(text):
    import duckdb

    with duckdb.connect() as connection:
        assert connection.execute(f"select {literal(text)}").fetchall() == [(text,)]
        assert connection.execute(f"select 1 as {identifier(text)}").description[0][0] == text
