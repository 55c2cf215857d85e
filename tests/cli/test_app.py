"""The `saeflow` command: every command on a small finished store."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from saeflow import __version__
from saeflow.cli import app as cli
from saeflow.cli.common import exit_code_of
from saeflow.cli.store import state_in_words
from saeflow.query.questions import Question, questions
from saeflow.recipe.recipe import Recipe, load_recipe
from saeflow.runtime.text import human_bytes
from saeflow.store.storage.folder import Folder
from saeflow.store.store import Store
from tests.conftest import Finished
from tests.support.command import SAEFLOW, Command, Connected, Said, one_connection
from tests.support.small_pipeline import (
    SITE,
    WIDTH,
    Ingredients,
    a_table,
    brought_data,
    recipe_data,
    tree,
    write_recipe,
    write_table,
)
from tests.support.small_store import Document, Given

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")
COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Store:
    """A copy of the finished store, to be damaged."""
    shutil.copytree(finished.store.root, tmp_path / "copied")
    return Store.open(tmp_path / "copied")


@pytest.fixture
def recipe_file(ingredients: Ingredients, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "small.toml", recipe_data(ingredients))


def test_version_is_printed(saeflow: Command) -> None:
    assert saeflow("--version").out.strip() == __version__


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example(name: str, saeflow: Command) -> None:
    said = saeflow(name, "--help")
    assert said.code == 0
    assert re.search(rf"Examples?:\s+saeflow\s+{name}\b", said.out)


def test_a_command_that_is_not_there_ends_with_2(saeflow: Command) -> None:
    said = saeflow("trian")
    assert said.code == 2
    assert "train" in said.err
    assert "Traceback" not in said.err


def test_light_commands_do_not_wait_for_torch(finished: Finished) -> None:
    code = (
        "import sys; from saeflow.cli import app\n"
        "for words in ['--help'], ['ls'], ['ask'], ['sql', 'select 1']:\n"
        "    sys.argv[1:] = words\n"
        "    try: app.main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "    heavy = [m for m in ('torch', 'transformers', 'prefect', 'zarr', 'numba') if m in sys.modules]\n"
        "    assert not heavy, (words, heavy)"
    )
    environment = os.environ | {"SAEFLOW_STORE": str(finished.store.root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_stages_one_by_one_make_the_store_that_run_makes(
    saeflow: Command, finished: Finished, recipe_file: Path, tmp_path: Path
) -> None:
    for stage in ("tokens", "collect", "train", "encode", "evaluate", "report"):
        said = saeflow(stage, recipe_file, "--store", tmp_path / "store")
        assert said.code == 0, said.err
        assert f"store: {tmp_path / 'store'}" in said.err
    assert tree(tmp_path / "store") == tree(finished.store.root)
    again = saeflow("run", recipe_file, "--store", tmp_path / "store")
    assert again.code == 0
    assert again.err.count("already done") == 6
    assert "66" in again.out  # documents
    assert again.out.count("$ saeflow ask ") == 3
    assert "Try next:" in again.out


def test_a_stage_that_the_recipe_has_not_is_refused(saeflow: Command, tmp_path: Path) -> None:
    source = write_table(tmp_path / "table.npy", a_table())
    recipe = write_recipe(tmp_path / "brought.toml", brought_data(source))
    said = saeflow("collect", recipe, "--store", tmp_path / "store")
    assert said.code == 2
    assert "bring, train, encode" in said.err
    assert saeflow("bring", recipe, "--store", tmp_path / "store").code == 0


def test_a_written_recipe_parses_and_says_the_defaults(saeflow: Command, tmp_path: Path) -> None:
    assert saeflow("init", "my.toml", "--model", "some/model", "--files", "a/*.txt").code == 0
    written = load_recipe(tmp_path / "my.toml", **{"activations.sites": ["a.site"]})
    assert written.model is not None
    assert written.model.path == "some/model"
    assert written.corpus is not None
    assert written.corpus.files == [str(tmp_path / "a/*.txt")]
    text = (tmp_path / "my.toml").read_text()
    lines = [re.sub(r"^# (?=\w+ = )", "", line) for line in text.splitlines() if "# e.g.: " not in line]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    everything = load_recipe(tmp_path / "all.toml", **{"activations.sites": ["a.site"]})
    named_by_hand = {"store", "data", "cluster"}  # a [cluster] with any setting is one
    assert everything.model_dump(exclude=named_by_hand) == written.model_dump(exclude=named_by_hand)
    for section, field in Recipe.model_fields.items():
        assert re.search(rf"^(# {section} =|{section} =|\[{section}\])", text, re.MULTILINE), field


def test_the_sites_of_a_model_that_is_named_are_left_open_with_the_way_to_list_them(
    saeflow: Command, tmp_path: Path
) -> None:
    said = saeflow("init", "my.toml", "--model", "my model")
    text = (tmp_path / "my.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("# sites = []")]
    assert line.endswith("List them: saeflow sites 'my model'")
    assert "saeflow sites 'my model'" in said.out
    assert "activations.sites is empty" in saeflow("run", "my.toml").err
    for options in ([], ["--model", "openai-community/gpt2"]):
        saeflow("init", f"{len(options)}.toml", *options)
        assert load_recipe(tmp_path / f"{len(options)}.toml").activations.sites == ["transformer.h.6.mlp.act"]


def test_the_next_command_that_init_prints_can_be_typed(saeflow: Command) -> None:
    assert "then: saeflow run 'my recipe.toml'" in saeflow("init", "my recipe.toml").out


def test_init_overwrites_nothing(saeflow: Command, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("mine")
    said = saeflow("init", "my.toml")
    assert said.code == 2
    assert "exists already" in said.err
    assert (tmp_path / "my.toml").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [["init", "nodir/my.toml"], ["ask", "runs", "-o", "nodir/x.csv"], ["sql", "select 1", "-o", "nodir/x.csv"]],
    ids=lambda words: words[0],
)
def test_a_file_in_a_folder_that_is_not_there_is_refused_before_work(arguments: list[str], saeflow: Command) -> None:
    said = saeflow(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "There is no folder nodir for " in said.err  # and not: no store at …
    assert len(said.err.splitlines()) == 1


def test_what_the_system_refuses_about_a_file_ends_with_one_message(
    saeflow: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: Path) -> bool:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "a.txt/b")

    monkeypatch.setattr(Path, "exists", refuse)
    said = saeflow("init", "my.toml")
    assert (said.code, said.out) == (2, "")
    assert said.err == "Not a directory at a.txt/b. --debug shows where it was needed.\n"


def test_an_edited_recipe_of_init_runs(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    saeflow("init", "my.toml", "--model", ingredients.model, "--files", ingredients.corpus)
    path = tmp_path / "my.toml"
    path.write_text(re.sub(r"^# sites = .*$", f'sites = ["{SITE}"]', path.read_text(), flags=re.MULTILINE))
    small = ["tokens.context_length=16", "sae.n_features=64", "sae.k=4", "train.n_tokens=2000", "feed.batch_rows=256"]
    said = saeflow("run", "my.toml", "-q", *(word for change in small for word in ("--set", change)))
    assert (said.code, said.out, said.err) == (0, "", "")
    assert "features/my-" in saeflow("ls").out


def test_set_changes_settings_and_names_what_it_cannot_read(saeflow: Command, recipe_file: Path) -> None:
    assert "--set sae.k" in saeflow("run", recipe_file, "--set", "sae.k").err
    said = saeflow("run", recipe_file, "--set", "sae.k=many")
    assert said.code == 2
    assert "sae.k is 'many'" in said.err


def test_quiet_says_nothing_and_verbose_says_every_setting(
    saeflow: Command, finished: Finished, recipe_file: Path
) -> None:
    quiet = saeflow("run", recipe_file, "-q", "--store", finished.store.root)
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    verbose = saeflow("tokens", recipe_file, "-v", "--store", finished.store.root)
    assert '"n_features":64' in verbose.err


def test_sites_lists_names_and_widths(saeflow: Command, ingredients: Ingredients) -> None:
    said = saeflow("sites", ingredients.model, "*.mlp.act")
    assert [line.split() for line in said.out.splitlines()[1:]] == [
        [SITE, str(WIDTH)],
        [SITE.replace("0", "1"), str(WIDTH)],
    ]
    assert len(saeflow("sites", ingredients.model).out.splitlines()) > 10


def test_a_pattern_that_no_site_matches_names_the_nearest(saeflow: Command, ingredients: Ingredients) -> None:
    said = saeflow("sites", ingredients.model, "*.mlp.acts")
    assert (said.code, said.out) == (2, "")
    assert "has no site '*.mlp.acts'. Nearest: " in said.err
    assert SITE in said.err


def test_ls_and_show_say_what_there_is(saeflow: Command, finished: Finished) -> None:
    listed = saeflow("ls", "--store", finished.store.root)
    for artefact in finished.store.artefacts():
        assert artefact.id in listed.out.replace("\n", "")
    shown = saeflow("show", "small", "--store", finished.store.root)
    assert "features/small-" in shown.out
    assert "variance_unexplained" in shown.out
    unknown = saeflow("show", "smal", "--store", finished.store.root)
    assert unknown.code == 2
    assert "Nearest: " in unknown.err


@pytest.fixture
def two_runs(saeflow: Command, tmp_path: Path) -> tuple[Path, Path]:
    """A recipe that was run with k = 4, then with k = 2; and the store."""
    recipe = write_recipe(tmp_path / "two.toml", brought_data(write_table(tmp_path / "two.npy", a_table()), name="two"))
    store = tmp_path / "two"
    for k in (4, 2):
        assert saeflow("run", recipe, "--set", f"sae.k={k}", "--store", store, "-q").code == 0
    return recipe, store


@pytest.mark.long
def test_show_and_run_mean_the_newest_run_of_a_name(saeflow: Command, two_runs: tuple[Path, Path]) -> None:
    (asked,) = json.loads(
        saeflow("sql", "from runs where is_current", "--run", "two", "-f", "json", "--store", two_runs[1]).out
    )
    assert asked["k"] == 2
    assert f"features/two-{asked['fp']}" in saeflow("show", "two", "--store", two_runs[1]).out


@pytest.mark.long
def test_the_commands_that_run_prints_answer_what_it_printed(saeflow: Command, two_runs: tuple[Path, Path]) -> None:
    recipe, store = two_runs
    for k, is_default in ((2, True), (4, False)):
        said = saeflow("run", recipe, "--set", f"sae.k={k}", "--store", store)
        commands = re.findall(r"^(?:\$|  ) ?saeflow ((?:ask|sql) .+)$", said.out, re.MULTILINE)
        answers = [words for line in commands if len(words := shlex.split(line)) > 3]
        assert len(answers) == 6
        assert all(("--run" in words) is not is_default for words in answers)
        (current,) = [row for row in json.loads(saeflow(*answers[-1], "-f", "json").out) if row["is_current"]]
        assert current["k"] == k


def test_the_store_is_the_option_then_the_environment_then_the_recipe_then_data_store(
    saeflow: Command, ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_table(tmp_path / "table.npy", a_table(40))
    with_store = write_recipe(tmp_path / "a.toml", brought_data(source, store="from-recipe"))
    without = write_recipe(tmp_path / "b.toml", brought_data(source))
    assert f"store: {tmp_path}/data/store\n" in saeflow("bring", without).err
    assert f"store: {tmp_path}/from-recipe\n" in saeflow("bring", with_store).err
    monkeypatch.setenv("SAEFLOW_STORE", str(tmp_path / "from-environment"))
    assert f"store: {tmp_path}/from-environment\n" in saeflow("bring", with_store).err
    assert f"store: {tmp_path}/from-option\n" in saeflow("bring", with_store, "--store", "from-option").err
    assert f"store: {tmp_path}/from-environment\n" in saeflow("ls").err


def test_a_store_that_is_not_there_is_named(saeflow: Command, tmp_path: Path) -> None:
    reading = (["ls"], ["ask", "runs"], ["sql", "select 1"], ["verify"], ["show", "x"])
    for command in (*reading, ["gc"], ["upgrade"], ["forget", "x"]):
        said = saeflow(*command)
        assert said.code == 2
        assert f"No store at {tmp_path}/data/store" in said.err
    assert not (tmp_path / "data").exists()


def a_shard(store: Store) -> Path:
    return min(store.root.glob("activations/*/parts/*/*.zarr/c.*"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_finds_nothing_wrong_with_a_finished_store(saeflow: Command, finished: Finished) -> None:
    for options in ([], ["--full"]):
        said = saeflow("verify", "--store", finished.store.root, *options)
        assert said.code == 0, said.out
        assert "nothing missing, nothing changed" in said.out


def test_a_flipped_byte_is_found_repaired_and_made_again(
    saeflow: Command, copied: Store, finished: Finished, recipe_file: Path
) -> None:
    shard = a_shard(copied)
    flip_a_byte(shard)
    found = saeflow("verify", "--full", "--store", copied.root)
    assert found.code == 2
    assert f"{shard} has changed" in found.out
    assert "--repair" in found.err
    assert saeflow("verify", "--full", "--repair", "--store", copied.root).code == 0
    assert not shard.exists()
    assert saeflow("run", recipe_file, "--store", copied.root).code == 0
    assert saeflow("verify", "--full", "--store", copied.root).code == 0
    assert tree(copied.root) == tree(finished.store.root)


@pytest.mark.parametrize("kind", ["tokens", "activations", "saes", "features"])
def test_a_missing_file_is_found_and_run_makes_it_again(
    kind: str, saeflow: Command, copied: Store, finished: Finished, recipe_file: Path
) -> None:
    lost = sorted(copied.root.glob(f"{kind}/*/parts/*") if kind != "saes" else copied.root.glob("saes/*/sae_*"))[-1]
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    found = saeflow("verify", "--store", copied.root)
    assert found.code == 2
    assert "damaged: " in found.out
    assert str(lost) in found.out
    assert saeflow("run", recipe_file, "--store", copied.root).code == 0
    assert tree(copied.root) == tree(finished.store.root)


def test_forgetting_twice_says_so_and_quietly_says_nothing(saeflow: Command, copied: Store) -> None:
    at = ("--store", copied.root)
    listed = json.loads(saeflow("sql", "select key from documents where n_tokens > 0", "-f", "json", *at).out)
    one, two = (row["key"] for row in listed[:2])
    assert saeflow("forget", one, "-q", *at) == Said(0, "", "")
    assert saeflow("forget", one, *at) == Said(0, f"{one!r} is forgotten already\n", "")
    both = saeflow("forget", one, two, *at).out
    assert f"{one!r} is forgotten already\n" in both
    assert "1 documents hidden" in both
    assert "saeflow gc --grace 0 --yes" in both


def an_unlisted_part(store: Store) -> Path:
    part = sorted(store.root.glob("tokens/*/parts/*"))[0]
    return Path(shutil.copytree(part, part.with_name("00009-unlisted")))


def test_the_sizes_of_a_store_are_read_from_its_records(copied: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store has millions of files."""
    monkeypatch.delattr(Folder, "footprint")
    for artefact in copied.artefacts():
        shown = {"parts", *(file.name for file in artefact.record.files)}
        inside = [path for path in artefact.path.rglob("*") if path.relative_to(artefact.path).parts[0] in shown]
        n_bytes = sum(path.stat().st_size for path in inside if path.is_file() and path.name != "part.json")
        assert state_in_words(artefact)[-1] == human_bytes(n_bytes)


def test_gc_says_what_it_leaves_to_a_run_at_work(saeflow: Command, copied: Store) -> None:
    artefact = copied.artefacts("tokens")[0]
    with artefact.writing():
        said = saeflow("gc", "--yes", "--store", copied.root)
    assert f"left alone: Another run is writing {artefact.id}: process {os.getpid()} on " in said.err


def test_what_gc_names_to_remove_is_removed_by_the_command_it_names(saeflow: Command, copied: Store) -> None:
    part = an_unlisted_part(copied)
    now = saeflow("gc", "--grace", 0, "--store", copied.root)
    assert "more after" not in now.out
    assert saeflow(*shlex.split(now.out.split("`")[1])[1:]).code == 0
    assert not part.exists()


def test_gc_says_what_is_still_within_the_grace_period(saeflow: Command, copied: Store) -> None:
    part = an_unlisted_part(copied)
    said = saeflow("gc", "--yes", "--store", copied.root)
    assert "0 files and folders, 0 B removed" in said.out
    assert re.search(r"^[\d.]+ \w+ more after 24 hours; now with --grace 0$", said.out, re.MULTILINE)
    assert part.exists()


def test_a_negative_grace_is_refused(saeflow: Command, copied: Store) -> None:
    assert saeflow("gc", "--grace", -1, "--store", copied.root).code == 2


def test_compact_names_both_ways_to_the_disk(saeflow: Command, copied: Store, recipe_file: Path) -> None:
    said = saeflow("compact", recipe_file, "--store", copied.root)
    assert "after 24 hours with: saeflow gc --yes; now with: saeflow gc --grace 0 --yes" in said.err


WORDS = {"bigint": "1", "double": "0.5", "text": "cat", "bigint[]": "1,2", "double[]": "0,0"}
NAMES = {
    "compare_sources": ["tales", "letters"],
    "source_contrast": ["tales", "letters"],
    "contrast_within": ["tales", "letters"],
    "approximate_contrast_within": ["tales", "letters"],
    "compare_runs": ["small", "small"],
    "correlate_runs": ["small", "small", "1,2", "2,3"],
    "split_features": ["1", "small"],
    "features_of_selection": ["--sql", "select token_id from tokens where token_id < 200"],
    "approximate_features_of_selection": ["--tokens", "20,21,22,23"],
    "absorption": ["--tokens", "20,21,22,23"],
    "tokens_of_span": ["tales/000", "0", "5"],
    "document_tokens": ["tales/000"],
    "document_features": ["tales/000"],
    "entry_followers": ["270"],
}
EFFECTS = ("effect_contexts", "effects_on_entries", "feature_effects")  # tests/meaning asks them of a run that has any
MAY_BE_EMPTY = (
    "feature_labels",
    "labels_of_feature",
    "scores_of_labels",
    "measured_effects",
    "left_out",
    "approximate_coactivation",
    "approximate_contrast_within",
    "approximate_features_by_role",
    "approximate_features_of_selection",
    "approximate_features_on",
    "annotations",
    "feature_rules",
    "feature_classes",
    "classes_of_feature",
    "sparse_probes",
    *EFFECTS,
    "explanation_scores",
    "explanation_mistakes",
)
NEEDS_ANNOTATIONS = ("annotated_tokens", "class_in_text", "features_of_class")  # tests/classes asks these


@pytest.fixture(scope="module")
def connected(finished: Finished) -> Iterator[Connected]:
    """For many questions: `tests/sql` asks each by a connection that is made for it."""
    with one_connection(finished.store) as found:
        yield found


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_every_question_can_be_asked(
    question: Question,
    saeflow: Command,
    finished: Finished,
    connected: Connected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saeflow.query.connection.connect_to_run", lambda *_, **__: connected)


def test_ask_without_a_question_lists_them(saeflow: Command) -> None:
    listed = saeflow("ask").out
    assert all(question.name in listed for question in questions())


def test_all_formats_give_the_same_rows(saeflow: Command, finished: Finished, tmp_path: Path) -> None:
    ask = ["ask", "tokens_where", 1, 0.0, "--store", finished.store.root, "-n", 7]
    wanted = json.loads(saeflow(*ask, "-f", "json").out)
    assert len(wanted) == 7
    assert [json.loads(line) for line in saeflow(*ask, "-f", "jsonl").out.splitlines()] == wanted
    rows = list(csv.DictReader(io.StringIO(saeflow(*ask, "-f", "csv").out)))
    assert [int(row["token_id"]) for row in rows] == [row["token_id"] for row in wanted]
    assert saeflow(*ask, "-f", "parquet", "-o", tmp_path / "answer.parquet").out == ""
    assert pq.read_table(tmp_path / "answer.parquet").to_pylist() == wanted
    assert str(wanted[0]["token_id"]) in saeflow(*ask).out


EVERY = "select token_id from stg_tokens limit 1200"


@pytest.mark.parametrize(
    "ask",
    [["ask", "tokens_where", "1"], pytest.param(["sql", EVERY], marks=pytest.mark.long)],
    ids=["ask", "sql"],
)
def test_only_a_table_on_the_screen_is_cut_unasked_and_it_says_so(
    ask: list[str], saeflow: Command, finished: Finished, tmp_path: Path
) -> None:
    ask = [*ask, "--store", str(finished.store.root)]
    n_rows = len(saeflow(*ask, "-f", "jsonl").out.splitlines())
    first = 20 if ask[0] == "ask" else 1000
    assert n_rows > first
    assert len(json.loads(saeflow(*ask, "-f", "json").out)) == n_rows
    assert len(saeflow(*ask, "-f", "csv").out.splitlines()) == n_rows + 1
    for name in ("all.parquet", "all.csv", "all.txt"):
        assert saeflow(*ask, "-o", tmp_path / name).code == 0
    assert pq.read_metadata(tmp_path / "all.parquet").num_rows == n_rows
    assert len((tmp_path / "all.csv").read_text().splitlines()) == n_rows + 1
    assert len((tmp_path / "all.txt").read_text().splitlines()) > n_rows
    cut = saeflow(*ask)
    assert f"The first {first:,} rows. More: -n {10 * first}; all: -o FILE.csv" in cut.err
    assert len(cut.out.splitlines()) < first + 10
    whole = saeflow(*ask, "-n", n_rows)
    assert len(whole.out.splitlines()) > n_rows
    assert "The first" not in whole.err


def test_a_question_asked_for_so_many_rows_shows_so_many(saeflow: Command, finished: Finished) -> None:
    said = saeflow("ask", "top_tokens", 1, 30, "--store", finished.store.root)
    assert len([line for line in said.out.splitlines() if "«" in line]) == 30  # a context is one line at any width
    assert "The first" not in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "top_token", "1"], "Did you mean top_tokens"),
        (["ask", "top_tokens", "cat"], "must be a whole number"),
        (["ask", "tokens_where"], "tokens_where needs"),
        (["ask", "top_tokens", "9999"], "There is no feature 9999; features go from 0 to 63."),
        (["ask", "tokens_where", "-1"], "There is no feature -1; features go from 0 to 63."),
        (["ask", "compare_sources", "tales", "nosuch"], "There is no source 'nosuch'. There are: "),
        (["ask", "runs", "--run", "smal"], "Did you mean small?"),
        (["sql", "select nothing from tokens"], "nothing"),
        (["sql", "copy tokens to 'stolen.parquet'"], "Only one statement that reads"),
        (["sql", "with x as (copy tokens to 'stolen.parquet') select 1"], ""),
        (["sql", "create table mine as select 1"], "Only one statement that reads"),
        (["sql", "select 1; drop view tokens"], "Only one statement that reads"),
        (["sql", "select * from read_text('/etc/hostname')"], ""),
        (["sql", "attach 'stolen.db'"], "Only one statement that reads"),
    ],
)
def test_what_cannot_be_asked_ends_with_2_and_one_message(
    arguments: list[str], message: str, saeflow: Command, finished: Finished, tmp_path: Path
) -> None:
    said = saeflow(*arguments, "--store", finished.store.root)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.glob("stolen*")) == []


def test_sources_that_are_named_cannot_speak_to_the_terminal(saeflow: Command, tmp_path: Path) -> None:
    Given(documents=[Document("k", "a\x1b[2Jb", [b"x"])], values=[]).write(tmp_path / "hostile")
    said = saeflow("ask", "compare_sources", "x", "y", "--store", tmp_path / "hostile")
    assert said.code == 2
    assert "There are: a␛[2Jb" in said.err
    assert "\x1b" not in said.err


def test_sql_answers_and_reads_a_pipe(saeflow: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = [
        "sql",
        "select sum(n_tokens)::bigint as n from documents where not held_out",
        "-f",
        "csv",
        "--store",
        finished.store.root,
    ]
    n = int(saeflow(*ask).out.split()[1])
    assert 0 < n < finished.summary["n_tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(ask[1]))
    assert int(saeflow(ask[0], *ask[2:]).out.split()[1]) == n


def test_the_script_runs_by_hand_in_duckdb(saeflow: Command, finished: Finished) -> None:
    script = saeflow("sql", "--script", "--store", finished.store.root).out
    with duckdb.connect() as connection:
        connection.execute(script)
        assert connection.execute("select sum(n_tokens) from documents").fetchone() == (finished.summary["n_tokens"],)


def test_the_script_goes_to_the_file_that_is_named(saeflow: Command, finished: Finished, tmp_path: Path) -> None:
    ask = ["sql", "--script", "--store", finished.store.root]
    said = saeflow(*ask, "-o", "run.sql")
    assert (said.code, said.out) == (0, "")
    assert (tmp_path / "run.sql").read_text() == saeflow(*ask).out


@pytest.mark.parametrize("ask", [["ask", "runs"], ["sql", "select 1"]], ids=["ask", "sql"])
def test_parquet_is_not_written_to_a_terminal(
    ask: list[str], saeflow: Command, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    said = saeflow(*ask, "-f", "parquet", "--store", finished.store.root)
    assert (said.code, said.out) == (2, "")
    assert "-o answer.parquet" in said.err


def on_a_terminal(arguments: list[str], lines: list[str], environment: dict[str, str]) -> str:
    """What a person sees who types a line at every prompt and then Ctrl-D."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*SAEFLOW, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environment
    )
    os.close(theirs)
    seen, typed = b"", 0
    while select.select([ours], [], [], 60)[0]:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other side has been closed
            break
        if len(re.findall(rb"saeflow> |    -> ", seen)) > typed:
            os.write(ours, f"{lines[typed]}\n".encode() if typed < len(lines) else b"\x04")
            typed += 1
    os.close(ours)
    assert process.wait(60) == 0, seen.decode()
    return seen.decode()


def test_the_prompt_answers_until_the_end(finished: Finished, tmp_path: Path) -> None:
    environment = {"TERM": "xterm", "COLUMNS": "100", "XDG_STATE_HOME": str(tmp_path)}
    lines = ["select 40 +", "2 as answer;", "select oops;", "select count(*) from stg_vocab;", ".questions", ".tables"]
    seen = on_a_terminal(["sql", "--store", str(finished.store.root)], lines, environment)
    assert "answer" in seen
    assert "42" in seen
    assert "oops" in seen
    assert "400" in seen
    assert "tokens_where" in seen
    assert "feature_summary" in seen
    assert "select oops;" in (tmp_path / "saeflow" / "history").read_text()
    assert COLOUR.search(seen)
    assert "Traceback" not in seen


def test_no_color_is_obeyed(finished: Finished, tmp_path: Path) -> None:
    environment = {"TERM": "xterm", "NO_COLOR": "1", "XDG_STATE_HOME": str(tmp_path)}
    seen = on_a_terminal(["sql", "--store", str(finished.store.root)], ["select oops;"], environment)
    assert "oops" in seen
    assert not COLOUR.search(seen)


def test_away_from_a_terminal_there_are_plain_lines(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    source = write_table(tmp_path / "table.npy", a_table())
    recipe = write_recipe(tmp_path / "brought.toml", brought_data(source))
    said = saeflow("run", recipe)
    assert "\x1b" not in said.out + said.err
    assert re.search(r"^activations: 700 rows in [\d.]+ s \([\d,]+/s\)$", said.err, re.MULTILINE)


def test_ctrl_c_ends_cleanly_and_says_how_to_continue(tmp_path: Path) -> None:
    source = write_table(tmp_path / "table.npy", a_table())
    recipe = write_recipe(tmp_path / "my recipe.toml", brought_data(source, train={"n_tokens": 10**9}))
    arguments = ["run", str(recipe), "--store", str(tmp_path / "store")]
    process = subprocess.Popen([*SAEFLOW, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("activations:"):
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130, said
    process.stderr.close()
    assert f"continue with: saeflow run '{recipe}' --store {tmp_path}/store" in said
    assert "Traceback" not in said


def test_doctor_says_versions_speeds_and_free_disk(saeflow: Command, tmp_path: Path) -> None:
    said = saeflow("doctor", "--store", tmp_path / "not-yet")
    assert said.code == 0
    for what in ("torch", "processor", "bfloat16 product", "GFLOP/s", "free for"):
        assert what in said.out
    assert not (tmp_path / "not-yet").exists()


def test_debug_shows_the_traceback(saeflow: Command, tmp_path: Path) -> None:
    command = [*SAEFLOW, "run", "missing.toml", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert "No recipe at missing.toml" in done.stderr


def test_nothing_of_a_corpus_reaches_the_terminal_as_a_command_through_a_message(
    saeflow: Command, ingredients: Ingredients, tmp_path: Path
) -> None:
    hostile = "\x1b]0;pwned\x07\u202e"
    pq.write_table(pa.table({"key": ["a"], "text": [hostile]}), tmp_path / "a.parquet")
    sql = f"select key, cast(text as int)::varchar as text from '{tmp_path}/a.parquet'"
    recipe = write_recipe(tmp_path / "r.toml", recipe_data(ingredients, corpus={"files": [], "sql": sql}))
    said = saeflow("tokens", recipe, "--store", tmp_path / "store")
    assert said.code == 2
    assert "pwned" in said.err
    assert not {"\x1b", "\x07", "\u202e"} & set(said.err)


def test_an_error_late_in_a_query_is_one_message(saeflow: Command, finished: Finished) -> None:
    late = "select cast(case when i = 900000 then 'x' else '1' end as int) as n from range(1000000) t(i)"
    said = saeflow("sql", late, "--store", finished.store.root, "-f", "csv")
    assert said.code == 2
    assert "Could not convert string 'x'" in said.err
    assert "Traceback" not in said.err


def test_settings_are_shown_as_they_are(saeflow: Command, ingredients: Ingredients, tmp_path: Path) -> None:
    folder = tmp_path / "texts[b]"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    data = recipe_data(ingredients, corpus={"files": [str(folder)]})
    assert saeflow("tokens", write_recipe(tmp_path / "r.toml", data), "--store", tmp_path / "store").code == 0
    assert "texts[b]" in saeflow("show", "small", "--store", tmp_path / "store").out.replace("\n", "")


@pytest.fixture(scope="module")
def swept(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with a sweep and the store in which `saeflow run` has run it."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = {"grid": {"sae.k": [2, 4], "sae.architecture": ["topk", "batchtopk"]}}
    recipe = write_recipe(folder / "small.toml", recipe_data(ingredients, sweep=sweep, train={"n_tokens": 3000}))
    arguments = ["run", str(recipe), "--store", str(folder / "store")]
    with (folder / "said").open("w") as said, contextlib.redirect_stdout(said):
        assert exit_code_of(cli.app, "saeflow", arguments, debug=False) == 0
    return recipe, folder / "store"


def test_a_sweep_prints_its_table_and_the_next_command_which_works(saeflow: Command, swept: tuple[Path, Path]) -> None:
    recipe, store = swept
    said = (recipe.parent / "said").read_text()
    for name in ("topk_k2", "topk_k4", "batchtopk_k2", "batchtopk_k4"):
        architecture, k = name.split("_k")
        assert re.search(rf"^small_{name} +{architecture} +k {k} +64 +[\d.]+ +[\d.]+ +[\d.]+%", said, re.M)
    assert re.search(r"yes *$", said, re.M)
    next_command = re.search(r"^Encode the corpus with one of them: saeflow (run .*)$", said, re.M)
    assert next_command is not None
    done = saeflow(*shlex.split(next_command[1]))
    assert done.code == 0, done.err
    assert "train: already done" in done.err
    assert "$ saeflow ask" in done.out
    assert [path.name.rpartition("-")[0] for path in (store / "features").iterdir()] == [
        next_command[1].split("--member ")[1].split()[0]
    ]


@pytest.mark.long
def test_a_stage_takes_one_sae_of_a_sweep_by_name(saeflow: Command, swept: tuple[Path, Path]) -> None:
    recipe, store = swept
    for stage in ("train", "encode", "evaluate", "report"):
        said = saeflow(stage, recipe, "--store", store, "--member", "small_topk_k2")
        assert said.code == 0, said.err
    assert any(path.name.startswith("small_topk_k2-") for path in (store / "features").iterdir())
    again = saeflow("evaluate", recipe, "--store", store)
    assert again.code == 0
    assert "4 SAEs in" in again.err
    assert "small_batchtopk_k4" in again.out


def test_an_sae_that_a_sweep_has_not_is_refused_with_the_nearest(
    saeflow: Command, swept: tuple[Path, Path], recipe_file: Path
) -> None:
    recipe, store = swept
    said = saeflow("run", recipe, "--store", store, "--member", "small_topk_k3")
    assert said.code == 2
    assert "small has no SAE 'small_topk_k3' in its sweep. Nearest: small_topk_k" in said.err
    said = saeflow("train", recipe_file, "--store", store, "--member", "small_topk_k3")
    assert (said.code, "the recipe has no [sweep]" in said.err) == (2, True)
    said = saeflow("report", recipe, "--store", store)
    assert said.code == 2
    assert "small is a sweep of 4 SAEs. Name one of them: saeflow report RECIPE --member NAME" in said.err
    assert "small_batchtopk_k4" in said.err


@pytest.mark.long
def test_all_saes_of_a_sweep_are_encoded_by_one_command(saeflow: Command, swept: tuple[Path, Path]) -> None:
    recipe, store = swept
    said = saeflow("encode", recipe, "--store", store)
    assert said.code == 0, said.err
    assert {path.name.rpartition("-")[0] for path in (store / "features").iterdir()} >= {
        "small_topk_k2",
        "small_batchtopk_k4",
    }
    assert saeflow("ask", "tokens_where", 1, "--run", "small_topk_k2", "--store", store).code == 0
