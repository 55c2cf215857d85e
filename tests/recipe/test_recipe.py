"""The recipe: what it accepts, and what it says about what it does not."""

from __future__ import annotations

import contextlib
import re

import pytest

from saeflow.recipe.cluster import ClusterConfig
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import load_recipe, parse_recipe
from saeflow.recipe.settings import SAEConfig
from saeflow.recipe.template import template
from saeflow.runtime.errors import UserError
from tests.support.small_pipeline import Ingredients, brought_data, recipe_data, write_recipe


@pytest.fixture
def nowhere(tmp_path) -> Ingredients:
    """Paths that need not exist: reading a recipe opens nothing."""
    return Ingredients(tmp_path / "model", tmp_path / "corpus.parquet")


def complaint(data) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(data, "my.toml")
    return str(caught.value)


def test_a_recipe_read_from_toml_equals_the_dict_it_was_written_from(tmp_path, nowhere):
    data = recipe_data(nowhere, sae={"k": 3})
    assert load_recipe(write_recipe(tmp_path / "small.toml", data)) == parse_recipe(data)


def test_sizes_may_be_written_with_units(nowhere):
    assert parse_recipe(recipe_data(nowhere, feed={"pool_bytes": "2GiB"})).feed.pool_bytes == 2 << 30


def test_relative_paths_count_from_the_recipes_folder_and_hub_names_and_urls_stay(tmp_path, nowhere):
    data = recipe_data(nowhere, corpus={"files": ["a/*.txt", "s3://b/c.parquet", "/d.csv"]}, store="../store")
    data["model"]["path"] = "openai-community/gpt2"
    recipe = load_recipe(write_recipe(tmp_path / "small.toml", data))
    assert recipe.corpus.files == [str(tmp_path / "a/*.txt"), "s3://b/c.parquet", "/d.csv"]
    assert recipe.model.path == "openai-community/gpt2"
    assert recipe.store == str(tmp_path.parent / "store")


@pytest.mark.parametrize(
    "sweep",
    [
        {"grid": {"sae.source": ["a", "b"]}, "each": [{"train.tensorboard": "logs"}]},
        {"grid": {"sae": {"source": ["a", "b"]}}, "each": [{"train": {"tensorboard": "logs"}}]},
        {"each": [{"sae.source": name, "train": {"tensorboard": "logs"}} for name in "ab"]},
    ],
)
def test_relative_paths_in_a_sweep_count_from_the_recipes_folder(tmp_path, nowhere, sweep):
    members = parse_recipe(recipe_data(nowhere) | {"sweep": sweep}, folder=tmp_path).members()
    assert [member.sae.source for member in members] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert {member.train.tensorboard for member in members} == {str(tmp_path / "logs")}


def test_made_rows_hold_no_more_features_than_are_known(tmp_path):
    made = {"kind": "sparse", "n_true": 3, "n_active": 4}
    assert "n_active is 4, but there are 3 known features" in complaint(
        {"name": "n", "activations": {"synthetic": made}}
    )


def test_a_model_folder_beside_the_recipe_is_found(tmp_path, nowhere):
    (tmp_path / "lm").mkdir()
    recipe = load_recipe(write_recipe(tmp_path / "small.toml", recipe_data(nowhere, model={"path": "lm"})))
    assert recipe.model.path == str(tmp_path / "lm")


def test_settings_given_by_dotted_name_come_before_the_files(tmp_path, nowhere):
    path = write_recipe(tmp_path / "small.toml", recipe_data(nowhere))
    assert load_recipe(path, **{"sae.k": 7, "name": "other"}).sae.k == 7


def test_one_file_or_site_needs_no_list(nowhere):
    recipe = parse_recipe(recipe_data(nowhere, corpus={"files": "a.txt"}, activations={"sites": "h.0"}))
    assert (recipe.corpus.files, recipe.activations.sites) == (["a.txt"], ["h.0"])


def test_a_recipe_cannot_be_changed_after_reading(nowhere):
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(recipe_data(nowhere)).sae.k = 9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sae": {"n_feature": 3}}, ["my.toml", "sae.n_feature", "Did you mean n_features?"]),
        ({"sae": {"zzz": 3}}, ["sae.zzz", "Known keys here", "architecture", "n_features"]),
        ({"model": {"pth": 3}}, ["model.pth", "Did you mean path?"]),
        ({"evalute": {}}, ["evalute", "Did you mean evaluate?"]),
        ({"sae": {"k": 0}}, ["sae.k is 0", "greater than 0", "Active features per token"]),
        ({"sae": {"k": 100, "n_features": 64}}, ["sae.k is 100", "sae.n_features is 64", "at most 64", "or raise"]),
        ({"sae": {"architecture": "dense"}}, ["sae.architecture is 'dense'", "relu", "gated", "topk", "batchtopk"]),
        ({"corpus": {"held_out": 1.0}}, ["corpus.held_out is 1.0", "less than 1"]),
        ({"feed": {"pool_bytes": "lots"}}, ["feed.pool_bytes is 'lots'", "byte"]),
        ({"tokens": {"packing": "tight"}}, ["tokens.packing is 'tight'", "concatenated", "isolated"]),
        ({"name": "My Run"}, ["name is 'My Run'", "pattern", "[a-z0-9]"]),
        ({"name": "n" * 300}, ["name is 'nnn", "at most 200 characters"]),
        ({"threads": 100_000}, ["threads is 100000", "less than or equal to 1024"]),
        ({"model": None}, ["0 sources", "exactly one", "[model]", "activations.source", "[activations.synthetic]"]),
        ({"activations": {"source": "t.csv"}}, ["2 sources", "exactly one"]),
        ({"corpus": None}, ["[corpus]", "missing", "files ="]),
        ({"activations": {"sites": []}}, ["activations.sites is empty", "saeflow sites"]),
    ],
)
def test_bad_input_is_named_with_what_is_allowed_and_the_way_out(nowhere, changes, says):
    message = complaint(recipe_data(nowhere, **changes))
    assert not [words for words in says if words not in message], message


def test_all_that_is_wrong_is_said_at_once(nowhere):
    message = complaint(recipe_data(nowhere, sae={"kk": 3, "seed": "x"}, train={"lr": -1.0}))
    assert all(name in message for name in ("sae.kk", "sae.seed", "train.lr"))


def test_a_missing_setting_is_named_with_its_meaning(nowhere):
    data = recipe_data(nowhere)
    del data["model"]["path"]
    assert re.search(r"model\.path is missing\. .*[Ff]older", complaint(data))


def test_more_features_than_k_is_asked_only_of_the_top_k_family():
    assert SAEConfig(architecture="relu", n_features=4).n_features == 4
    with pytest.raises(ValueError, match=r"sae\.k is 32"):
        SAEConfig(architecture="topk", n_features=4)


def test_a_recipe_that_is_not_there_or_not_toml_is_said_plainly(tmp_path):
    with pytest.raises(UserError, match=r"No recipe at .*none\.toml.*saeflow init"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = = 3")
    with pytest.raises(UserError, match=r"bad\.toml is not valid TOML.*line 1"):
        load_recipe(tmp_path / "bad.toml")


def test_a_brought_table_needs_no_model(tmp_path):
    assert parse_recipe(brought_data(tmp_path / "t.npy")).model is None


def test_the_recipe_that_init_writes_can_be_read(tmp_path):
    (tmp_path / "new.toml").write_text(template("new", "new.toml"), "utf-8")
    assert load_recipe(tmp_path / "new.toml").name == "new"


@pytest.mark.parametrize("key", ["data", "store", "threads"])
def test_what_init_shows_at_the_top_is_the_default_when_it_is_uncommented(tmp_path, key):
    text = template("new", "new.toml")
    (tmp_path / "new.toml").write_text(text.replace(f"# {key} = ", f"{key} = "), "utf-8")
    assert load_recipe(tmp_path / "new.toml").data_name == "new"


def commented_settings() -> list[str]:
    return re.findall(r"^# (\w+ = .*)$", template("new", "new.toml").partition("\n[")[2], re.MULTILINE)


@pytest.mark.parametrize("line", commented_settings())
def test_every_setting_that_init_shows_is_of_the_right_kind_when_it_is_uncommented(tmp_path, line):
    text = template("new", "new.toml").replace(f"# {line}\n", f"{line}\n")
    (tmp_path / "new.toml").write_text(text, "utf-8")
    one_too_many = re.match(r"source = .*Bring|synthetic", line)  # of sources: the model is there already
    with pytest.raises(UserError, match="2 sources of act") if one_too_many else contextlib.nullcontext():
        load_recipe(tmp_path / "new.toml")


def test_fingerprints_do_not_depend_on_order_or_machine_and_tell_facts_apart():
    assert fingerprint({"a": 1, "b": "猫"}) == fingerprint({"b": "猫", "a": 1}) == "3ff501ca"
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint(SAEConfig()) == fingerprint(SAEConfig().model_dump(mode="json"))


@pytest.mark.parametrize(
    "options",
    [
        {"preload": "import os; os.system('touch ran')"},
        {"preload_nanny": ["code.py"]},
        {"worker_class": "evil.Worker"},
        {"env": {"DASK_DISTRIBUTED__WORKER__PRELOAD": "code.py"}},
        {"job_script_prologue": ["touch ran"]},
        {"worker_extra_args": ["--preload", "code.py"]},
        {"python": "/tmp/evil"},
        {"plugins": ["evil"]},
        {"queue": "short\ntouch ran"},
        {"walltime": "$(touch ran)"},
        {"resources": {"a; touch ran": 1}},
        {"local_directory": "/tmp --preload /tmp/evil.py"},
        {"interface": "--preload=/tmp/evil.py"},
        {"project": "me  --export=LD_PRELOAD=/tmp/evil.so"},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_a_cluster_name_no_code(options):
    with pytest.raises(ValueError, match=r"could name code|may hold only letters"):
        ClusterConfig(kind="slurm", n_workers=1, options=options)


@pytest.mark.parametrize("kind", [None, "local", "local-cuda"])
@pytest.mark.parametrize(
    "options", [{"host": "0.0.0.0"}, {"interface": "eth0"}, {"dashboard_address": ":8787"}, {"host": "127.0.0.1.evil"}]
)
def test_a_local_cluster_listens_on_this_machine_alone(kind, options):
    with pytest.raises(ValueError, match="listens on this machine alone"):
        ClusterConfig(kind=kind, options=options)
    assert ClusterConfig(kind="local", options={"dashboard_address": "127.0.0.1:8787", "interface": "lo"})
    assert ClusterConfig(kind="slurm", n_workers=1, options=options)  # workers on other machines have to reach it


def test_options_of_a_cluster_say_sizes_times_and_queues():
    options = {"memory": "16GB", "walltime": "04:00:00", "queue": "gpu-long", "resources": {"GPU": 1}, "cores": 4}
    options |= {"resource_spec": "select=1:ncpus=4 mem=16gb", "local_directory": "/tmp/-odd"}
    assert ClusterConfig(kind="slurm", n_workers=1, options=options).options == options
