"""Autoencoders by name: a folder of a repository on the hub, or one of SAELens' catalogue, which is read as data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saeflow.runtime.errors import UserError
from saeflow.sae.formats.hub import locate
from tests.support.hub_server import Hub, hub_server
from tests.support.published_saes import LAYOUTS, gemma_scope, qwen_scope, saelens, write_json
from tests.support.small_saes import F, K

PROGRAM = """
import json, sys
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.errors import UserError
from saeflow.sae.formats.source import describe_source
answers = {}
for source in json.load(sys.stdin):
    try:
        found = describe_source(SAEConfig(source=source))
    except UserError as error:
        answers[source] = {"refused": str(error)}
    else:
        about = {"architecture": found.config.architecture, "n_features": found.config.n_features, "k": found.config.k}
        answers[source] = about | {"writer": found.writer, "hook": found.hook, "scale": found.scale.read,
                                   "l0": found.metadata.get("l0"), "at": str(found.weights)}
print(json.dumps(answers))
"""
CATALOGUE = """
tiny-res:
  conversion_func: null
  repo_id: someone/saes
  config_overrides: {normalize_activations: expected_average_only_in, hook_name: blocks.1.hook_resid_post}
  saes:
  - {id: blocks.1.hook_resid_post, path: scaled, l0: 12.5, norm_scaling_factor: 1.25, variance_explained: 0.8}
tiny-qwen:
  conversion_func: qwen_scope
  repo_id: someone/SAE-Res-Tiny-W1K-L0_5
  saes:
  - {id: layer0, path: layer0.sae.pt, l0: 5}
"""


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ask(hub: Hub, home: Path, sources: list[str], **environment: str) -> dict[str, dict[str, Any]]:
    """Describe sources in a process of its own, beside an sae_lens that ends whoever imports it."""
    package = home / "packages" / "sae_lens"
    write_json(package / "unused.json", {})
    (package / "__init__.py").write_text("raise SystemExit('sae_lens was imported')")
    (package / "pretrained_saes.yaml").write_text(CATALOGUE)
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    own = os.environ | hub.environment | {"HF_HOME": str(home / "hf"), "PYTHONPATH": path} | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(sources), env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return answers


GEMMA = "someone/gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_71"
SPARSE, PLAIN = "hf://someone/saes/layers.0.mlp", "someone/saes@main/scaled"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hub")
    gemma_scope(folder / "gemma")
    qwen_scope(folder / "qwen")
    saelens(folder / "saes" / "scaled", "plain")
    LAYOUTS["sparsify"](folder / "saes")
    (folder / "saes" / "README.md").write_text("not asked for")
    sources = [GEMMA, SPARSE, PLAIN, "someone/saes", "someone/saes/layer.0", "nobody/nothing/x"]
    sources += ["tiny-res/blocks.1.hook_resid_post", "tiny-res/blocks.2", "tiny-qwen/layer0"]
    with hub_server() as hub:
        hub.models["someone/gemma-scope-2b-pt-res"] = [files_below(folder / "gemma" / "gemma-scope-2b-pt-res")]
        hub.models["someone/saes"] = [files_below(folder / "saes")]
        (qwen,) = (folder / "qwen").iterdir()
        hub.models["someone/SAE-Res-Tiny-W1K-L0_5"] = [files_below(qwen)]
        found = ask(hub, folder, sources)
        asked = [path for _, path, _ in hub.asked]
    assert not any("README" in path for path in asked), "only the files of the SAE are downloaded"
    return found


def test_a_folder_of_a_repository_opens(answers: dict[str, dict[str, Any]]) -> None:
    gemma, sparse, plain = (answers[name] for name in (GEMMA, SPARSE, PLAIN))
    assert (gemma["writer"], gemma["n_features"], gemma["l0"]) == ("Gemma Scope", F, 71)
    assert gemma["hook"] == "blocks.0.hook_resid_post"
    assert (sparse["writer"], sparse["k"], sparse["hook"]) == ("sparsify", K, "layers.0.mlp")
    assert (plain["writer"], plain["architecture"], plain["scale"]) == ("SAELens", "relu", 1.0)


@pytest.mark.long
def test_what_was_downloaded_opens_without_the_hub(tmp_path: Path) -> None:
    gemma_scope(tmp_path / "gemma")
    with hub_server() as hub:
        hub.models["someone/gemma-scope-2b-pt-res"] = [files_below(tmp_path / "gemma" / "gemma-scope-2b-pt-res")]
        found = ask(hub, tmp_path, [GEMMA])
    with hub_server() as away:
        assert ask(away, tmp_path, [GEMMA], HF_HUB_OFFLINE="1") == found


def test_the_catalogue_of_saelens_gives_repository_factor_and_figures(answers: dict[str, dict[str, Any]]) -> None:
    found = answers["tiny-res/blocks.1.hook_resid_post"]
    assert (found["scale"], found["l0"], found["hook"]) == (1.25, 12.5, "blocks.1.hook_resid_post")
    assert (answers["tiny-qwen/layer0"]["writer"], answers["tiny-qwen/layer0"]["k"]) == ("Qwen-Scope", K)
    refused = answers["tiny-res/blocks.2"]["refused"]
    assert "has no 'blocks.2' there. Nearest: blocks.1.hook_resid_post" in refused


@pytest.mark.parametrize("source", ["someone/saes/../../../etc", "someone/saes@main/..", "hf://someone/saes/.."])
def test_a_name_never_leads_out_of_its_repository(source: str) -> None:
    with pytest.raises(UserError, match=r"named without `\.\.`"):
        locate(source)


def test_a_name_that_leads_nowhere_says_what_is_there(answers: dict[str, dict[str, Any]]) -> None:
    assert "has no SAE in its top folder" in answers["someone/saes"]["refused"]
    assert "has no SAE in layer.0" in answers["someone/saes/layer.0"]["refused"]
    assert "layers.0.mlp" in answers["someone/saes/layer.0"]["refused"]
    nowhere = answers["nobody/nothing/x"]["refused"]
    assert "sae.source: nobody/nothing is neither a local folder nor can it be read on the hub" in nowhere
    assert "RELEASE/SAE" in nowhere
