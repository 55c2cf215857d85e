"""Corpora and models that are elsewhere: on the hub, in an object store."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem

from saeflow.corpus import sources
from saeflow.model.load import load_tokenizer, model_fingerprint
from saeflow.pipeline import tokens
from saeflow.pipeline.lineage import Lineage
from saeflow.recipe.data_settings import CorpusConfig, ModelConfig
from saeflow.recipe.recipe import Recipe, parse_recipe
from saeflow.runtime.errors import UserError
from saeflow.runtime.progress import Progress
from saeflow.store.files import read_json
from saeflow.store.store import Store
from tests.support.hub_server import Hub, hub_server, sha_of
from tests.support.s3_server import SECRET, Server, s3_server
from tests.support.small_pipeline import Ingredients, documents, recipe_data

ROWS = documents()


def table(rows: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def keys(files: str) -> list[str]:
    return [document.key for document in sources.open_corpus(CorpusConfig(files=[files])).documents]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    HfFileSystem.clear_instance_cache()
    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.environment["HF_ENDPOINT"])
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.environment["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server
    HfFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.bucket("texts")
        yield server


def on_the_hub(ingredients: Ingredients) -> Recipe:
    files = ["hf://datasets/someone/texts/data/*.parquet"]
    return parse_recipe(recipe_data(ingredients, corpus={"files": files}))


def test_a_data_set_of_the_hub_gives_the_tokens_of_a_local_copy_and_its_commit_is_recorded(
    hub: Hub, ingredients: Ingredients, tmp_path: Path, progress: Progress
) -> None:
    hub.datasets["someone/texts"] = [{"data/a.parquet": table(ROWS[:40]), "data/b.parquet": table(ROWS[40:])}]
    store = Store.create(tmp_path / "store")
    made = tokens.run(Lineage(store, on_the_hub(ingredients)), progress)
    local = tokens.run(Lineage(store, parse_recipe(recipe_data(ingredients))), progress)
    assert [part.counts for part in made.published().parts] == [part.counts for part in local.published().parts]
    for one, other in zip(made.published().parts, local.published().parts, strict=True):
        assert pq.read_table(made.part_file(one, "tokens.parquet")).equals(
            pq.read_table(local.part_file(other, "tokens.parquet"))
        )
    seen = read_json(made.path / "provenance.json")["corpus_files"]
    assert seen == [f"hf://datasets/someone/texts@{sha_of('someone/texts', 0)}/data/*.parquet"]


def test_a_new_commit_of_a_data_set_adds_only_its_new_documents(
    hub: Hub, ingredients: Ingredients, tmp_path: Path, progress: Progress
) -> None:
    hub.datasets["someone/texts"] = [{"data/a.parquet": table(ROWS[:40])}]
    store, recipe = Store.create(tmp_path / "store"), on_the_hub(ingredients)
    before = tokens.run(Lineage(store, recipe), progress).published()
    hub.asked.clear()
    assert tokens.run(Lineage(store, recipe), progress).published() == before
    assert not [path for _, path, _ in hub.asked if "resolve" in path]
    hub.datasets["someone/texts"].append({"data/a.parquet": table(ROWS[:40]), "data/b.parquet": table(ROWS[40:])})
    after = tokens.run(Lineage(store, recipe), progress).published()
    assert after.parts[: len(before.parts)] == before.parts
    assert after.total("n_documents") == len(ROWS)


def test_a_commit_named_in_the_recipe_is_the_one_that_is_read(hub: Hub) -> None:
    hub.datasets["someone/texts"] = [{"a.parquet": table(ROWS[:3])}, {"a.parquet": table(ROWS[:5])}]
    first = sha_of("someone/texts", 0)
    assert len(keys("hf://datasets/someone/texts/a.parquet")) == 5
    assert len(keys(f"hf://datasets/someone/texts@{first}/a.parquet")) == 3


def test_a_data_set_that_is_not_there_is_said_with_the_way_out(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"(?s)hf://datasets/no/such/\*\.parquet cannot be read .*HF_TOKEN"):
        keys("hf://datasets/no/such/*.parquet")


def saeflow(hub: Hub, home: Path, *words: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | hub.environment | {"HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-c", "from saeflow.cli.app import main; main()", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_a_gated_model_names_its_licence_page_and_opens_with_a_token(ingredients: Ingredients, tmp_path: Path) -> None:
    with hub_server() as hub:
        files = {path.name: path.read_bytes() for path in ingredients.model.iterdir()}
        hub.gated["someone/model"] = ("hf_never_shown", files)
        refused = saeflow(hub, tmp_path / "home", "sites", "someone/model")
        assert refused.returncode == 2
        assert "https://huggingface.co/someone/model" in refused.stderr
        assert "HF_TOKEN" in refused.stderr
        opened = saeflow(hub, tmp_path / "home", "sites", "someone/model", token="hf_never_shown")
    assert opened.returncode == 0, opened.stderr
    assert "transformer.h.0.mlp.act" in opened.stdout
    assert "hf_never_shown" not in opened.stdout + opened.stderr


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_tables_and_texts_in_a_bucket_are_read_even_where_connections_break(s3: Server, share: float) -> None:
    client = s3.client()
    client.put_object(Bucket="texts", Key="tables/a.parquet", Body=table(ROWS[:40]))
    client.put_object(Bucket="texts", Key="tables/b.parquet", Body=table(ROWS[40:]))
    client.put_object(Bucket="texts", Key="books/one/x.txt", Body="größer".encode())
    client.put_object(Bucket="texts", Key="books/two.txt", Body=b"small")
    s3.drop(share)
    assert keys("s3://texts/tables/*.parquet") == sorted(row["key"] for row in ROWS)
    assert keys("s3://texts/books/**/*.txt") == ["one/x.txt", "two.txt"]
    s3.drop(0)


def test_a_changed_object_changes_the_signature_and_nothing_else_does(s3: Server) -> None:
    config = CorpusConfig(files=["s3://texts/changing.parquet"])
    s3.client().put_object(Bucket="texts", Key="changing.parquet", Body=table(ROWS[:3]))
    before = sources.corpus_signature(config)
    assert sources.corpus_signature(config) == before
    s3.client().put_object(Bucket="texts", Key="changing.parquet", Body=table(ROWS[:4]))
    assert sources.corpus_signature(config) != before


def test_the_signature_of_many_objects_takes_no_request_for_each(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CorpusConfig(files=["s3://texts/many/*.txt"])
    for number in range(3):
        s3.client().put_object(Bucket="texts", Key=f"many/{number}.txt", Body=b"text")
    monkeypatch.delattr("saeflow.corpus.remote.object_state")
    before = sources.corpus_signature(config)
    assert sources.corpus_signature(config) == before
    s3.client().put_object(Bucket="texts", Key="many/1.txt", Body=b"tale")
    assert sources.corpus_signature(config) != before


@pytest.mark.long
def test_a_bucket_that_does_not_answer_is_said_without_the_secret(s3: Server) -> None:
    with pytest.raises(UserError, match=r"(?s)s3://nowhere/x\.parquet.*AWS_ACCESS_KEY_ID") as caught:
        keys("s3://nowhere/x.parquet")
    assert SECRET not in str(caught.value)


def test_globs_over_folders_of_a_bucket_give_the_files_in_them(s3: Server) -> None:
    for key in ("shelf/a.txt", "shelf/row/b.txt", "shelf/row/deep/c.txt"):
        s3.client().put_object(Bucket="texts", Key=key, Body=b"text")
    assert keys("s3://texts/shelf/**") == ["a.txt", "row/b.txt", "row/deep/c.txt"]
    assert keys("s3://texts/shelf/*") == ["a.txt"]
    assert len(keys("s3://texts/shelf/row")) == 2


@pytest.mark.parametrize("url", ["https://h/x.jsonl?X-Amz-Signature=s3cr3t", "https://user:s3cr3t@h/x.jsonl"])
def test_a_url_that_holds_a_secret_is_refused_without_it(url: str) -> None:
    with pytest.raises(UserError, match=r"https://h/x\.jsonl comes with a query or a password") as caught:
        keys(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.long
def test_without_a_way_to_the_hub_a_model_that_was_downloaded_goes_on(ingredients: Ingredients, tmp_path: Path) -> None:
    with hub_server() as hub:
        files = {path.name: path.read_bytes() for path in ingredients.model.iterdir()}
        hub.gated["someone/model"] = ("hf_token", files)
        online = saeflow(hub, tmp_path / "home", "sites", "someone/model", token="hf_token")
        assert online.returncode == 0, online.stderr
    offline = saeflow(hub, tmp_path / "home", "sites", "someone/model")
    assert (offline.returncode, offline.stdout) == (0, online.stdout), offline.stderr
    unknown = saeflow(hub, tmp_path / "home", "sites", "someone/else")
    assert unknown.returncode == 2
    assert "model.path is 'someone/else'" in unknown.stderr
    assert len(unknown.stderr.splitlines()) <= 4


def test_a_model_is_loaded_at_the_commit_that_its_fingerprint_stands_for(
    hub: Hub, ingredients: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = {path.name: path.read_bytes() for path in ingredients.model.iterdir()}
    hub.gated["someone/pinned"] = ("hf_token", files)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    config = ModelConfig(path="someone/pinned")
    assert model_fingerprint(config) == model_fingerprint(config)
    load_tokenizer(config)
    loaded = {path for _, path, _ in hub.asked if "/resolve/" in path}
    assert loaded
    assert all(f"/resolve/{'0' * 40}/" in path for path in loaded)
