"""Only statements that read are let through, whatever DuckDB's grammar offers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import duckdb
import pytest

from saeflow.corpus.sources import open_corpus
from saeflow.recipe.data_settings import CorpusConfig
from saeflow.runtime.errors import UserError
from saeflow.runtime.sql_judge import only_reads

WRITES = {
    "ALTER": "alter table t add column b integer",
    "ANALYZE": "analyze t",
    "ATTACH": "attach '{out}' as other",
    "CALL": "call force_checkpoint()",
    "COPY": "copy t to '{out}'",
    "COPY of a select": "copy (select 1) to '{out}' (use_tmp_file false)",
    "COPY FROM": "copy t from '{out}'",
    "COPY_DATABASE": "copy from database memory to other",
    "CREATE": "create table u as select 1",
    "CREATE_FUNC": "create macro f(x) as x",
    "CREATE VIEW": "create or replace view v as select 2",
    "CREATE SECRET": "create secret s (type s3)",
    "CREATE TYPE": "create type mood as enum ('a')",
    "CREATE SEQUENCE": "create sequence s2",
    "DELETE": "delete from t returning a",
    "DETACH": "detach memory",
    "DROP": "drop table t",
    "EXECUTE": "execute p",
    "EXPLAIN of a write": "explain delete from t",
    "EXPLAIN ANALYZE of a write": "explain analyze delete from t",
    "EXPLAIN ANALYZE, written oddly": "/* a */ eXplain /* b */ analyze insert into t values (2)",
    "EXPLAIN with options": "explain (analyze, format json) insert into t values (2)",
    "EXPLAIN ANALYZE of a CTE": "explain analyze with x as (insert into t values (2)) select 1",
    "EXPORT": "export database '{out}'",
    "IMPORT": "import database '{out}'",
    "INSERT": "insert into t values (2) returning a",
    "INSTALL": "install httpfs",
    "LOAD": "load httpfs",
    "MERGE_INTO": "merge into t using (select 1 b) u on t.a = u.b when matched then delete",
    "MULTI": "select 1; drop table t",
    "MULTI with remarks": "select 1 /* ; */ ; -- select\n delete from t",
    "PIVOT makes a type": "pivot t on a using sum(a)",
    "PRAGMA": "pragma enable_profiling",
    "PREPARE": "prepare p as delete from t",
    "RESET": "reset threads",
    "SET": "set threads = 1",
    "SET VARIABLE": "set variable x = 1",
    "TRANSACTION": "begin transaction",
    "TRUNCATE": "truncate t",
    "UPDATE": "update t set a = 3",
    "UPDATE_EXTENSIONS": "update extensions",
    "USE": "use memory",
    "VACUUM": "vacuum",
    "CHECKPOINT": "checkpoint",
    "CTE: COPY": "with x as (copy (select 1) to '{out}' (use_tmp_file false)) select 1",
    "CTE: COPY, batches": "with x as (copy (select * from t) to '{out}' (format parquet)) select 1",
    "CTE: COPY inside a CTE": "with x as (with y as (copy (select 1) to '{out}') select 1) from x",
    "CTE: COPY in a subquery": "select (with y as (copy (select 1) to '{out}') select 1)",
    "CTE: INSERT": "with x as (insert into t values (2)) select 1",
    "CTE: INSERT RETURNING": "with x as materialized (insert into t values (2) returning a) from x",
    "CTE: UPDATE": "with x as (update t set a = 3 returning a) from x",
    "CTE: DELETE": "with x as (delete from t returning a) from x",
    "CTE: MERGE": "with x as (merge into t using t u on false when matched then delete returning a) from x",
    "CTE of a SHOW": "describe with x as (insert into t values (2)) select 1",
    "UNION": "select 1 union all (with x as (insert into t values (2)) select 1)",
    "query": "from query('select 1')",
    "query of a COPY": "from query('with x as (copy (select 1) to ''{out}'') select 1')",
    "serialised": "from json_execute_serialized_sql(json_serialize_sql('select 1'))",
    "checkpoint": "from force_checkpoint()",
    "logging": "from enable_logging(storage = 'file', storage_path = '{out}')",
    "logs": "from truncate_duckdb_logs()",
    "secrets": "from duckdb_secrets()",
    "pointers": "from arrow_scan(1, 2, 3)",
    "seed": "select setseed(0.5)",
    "sequence": "select nextval('s')",
    "log": "select write_log('x')",
    "wait": "select pg_sleep(0)",
    "tables of rejects": "from read_csv('{file}', store_rejects = true)",
    "tables of rejects, by another name": "from read_csv('{file}', REJECTS_TABLE => 't', ignore_errors => true)",
    "tables of rejects, in a CTE": "with x as (from read_csv_auto('{file}', rejects_table := 'u')) from x",
    "tables of rejects, of a guess": "from sniff_csv('{file}', store_rejects = true)",
    "hidden in a lambda": "select list_transform([1], x -> nextval('s'))",
    "hidden in a join": "from t join (from force_checkpoint()) on true",
}


READS = [
    "select a from t where a in (select 1) order by a limit 1",
    "values (1), (2)",
    "table t",
    "from v",
    "describe t",
    "show tables",
    "summarize t",
    "with recursive r as (select 1 a union all select a + 1 from r where a < 5) select count(*) from r",
    "select 1 union select 2 except select 3",
    "from range(3) x join t on x.range = t.a",
    "select unnest([1, 2]), row_number() over (order by 1), random(), 'copy insert delete'",
    "from t left join t u using (a) semi join t w using (a) asof join t z on t.a >= z.a positional join t y",
    "select a, count(*) from t group by rollup (a) having count(*) > 0",
    "from t using sample 1 rows",
    "explain from t",
    "EXPLAIN ANALYZE from t",
    "from duckdb_tables()",
    "-- drop table t\nselect 1 /* ; delete from t */;",
    "select * from (values (1)) \"insert\"",
    "select exists(select 1 from t u where u.a = t.a) from t",
]  # fmt: skip


@pytest.fixture
def connection():
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        connection.execute("create table t as select 1 a; create view v as from t; create sequence s")
        yield connection


@pytest.mark.parametrize("kind", WRITES)
def test_no_statement_that_does_more_than_read_is_let_through(connection, tmp_path, kind):
    (file := tmp_path / "in.csv").write_text("a\n1\n2,3\n")
    with contextlib.suppress(duckdb.Error):  # some DuckDB itself can neither parse nor plan
        assert not only_reads(connection, WRITES[kind].format(out=tmp_path / "out", file=file))
    assert list(tmp_path.iterdir()) == [file]
    assert connection.execute("from t").fetchall() == [(1,)]
    assert connection.execute("show tables").fetchall() == [("t",), ("v",)]


@pytest.mark.parametrize("sql", READS)
def test_a_statement_that_reads_is_let_through(connection, sql):
    assert only_reads(connection, sql)
    assert connection.execute(sql).fetchall()


def test_every_kind_of_statement_of_duckdbs_grammar_is_tried(connection):
    kinds = {each.name for each in duckdb.StatementType.__members__.values()}
    never_parsed = {"INVALID", "LOGICAL_PLAN", "EXTENSION", "RELATION", "VARIABLE_SET", "SELECT", "EXPLAIN"}
    tried = {kind.partition(" ")[0].strip(":,") for kind in WRITES} | {"MULTI"}
    assert kinds - never_parsed <= tried


@pytest.mark.parametrize("kind", [kind for kind in WRITES if kind.startswith(("COPY", "CTE", "query", "EXPLAIN"))])
def test_a_select_of_a_recipe_writes_nothing(tmp_path, kind):
    sql = WRITES[kind].format(out=tmp_path / "out")
    with pytest.raises(UserError, match=r"corpus\.sql"):
        list(open_corpus(CorpusConfig(sql=sql)).documents)
    assert list(tmp_path.iterdir()) == []


def test_a_select_of_a_recipe_reads_the_users_files(tmp_path):
    (tmp_path / "a.csv").write_text("key,text\na,one\n")
    sql = f"with x as (from read_csv('{tmp_path}/a.csv')) select key, text from x"
    assert [each.key for each in open_corpus(CorpusConfig(sql=sql)).documents] == ["a"]
    assert list(Path(tmp_path).iterdir()) == [tmp_path / "a.csv"]
