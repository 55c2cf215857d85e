"""Language models: their sites, reading them, replacing what they give."""

from __future__ import annotations

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from saeflow.model.load import load_model, load_tokenizer, model_fingerprint
from saeflow.model.sites import Site, SiteReader, list_sites, require_running_order, resolve_sites, spliced
from saeflow.recipe.data_settings import ModelConfig
from saeflow.runtime.errors import UserError
from tests.support.small_pipeline import SITE, WIDTH

IDS = torch.tensor([[5, 9, 300, 2], [7, 7, 1, 0]])


@pytest.fixture(scope="module")
def model(ingredients):
    return load_model(ModelConfig(path=str(ingredients.model)))


def _zeros(x, there):
    return torch.zeros_like(there)


def read(model, names, ids=IDS, mask=None):
    with contextlib.closing(SiteReader(model, resolve_sites(model, names))) as reader:
        return reader.read(ids, mask)


def names(sites: list[Site]) -> list[str]:
    return [site.name for site in sites]


def test_sites_are_listed_with_their_widths_in_running_order(model):
    widths = {site.name: site.width for site in list_sites(model)}
    assert (
        widths["transformer.wte"] == widths["transformer.h.0"] == widths[f"{SITE}:input".replace("act", "c_fc")] == 16
    )
    assert widths[SITE] == widths[f"{SITE}:input"] == widths["transformer.h.1.mlp.act"] == WIDTH
    order = [
        n for n in widths if n in ("transformer.wte", SITE, "transformer.h.0", "transformer.h.1.mlp.act", "lm_head")
    ]
    assert order == ["transformer.wte", SITE, "transformer.h.0", "transformer.h.1.mlp.act", "lm_head"]


def test_globs_find_sites_in_running_order_and_inputs_only_when_asked_for(model):
    assert names(resolve_sites(model, ["transformer.h.*.mlp.act"])) == [SITE, "transformer.h.1.mlp.act"]
    assert names(resolve_sites(model, ["transformer.h.*.mlp.act:input"])) == [
        f"{SITE}:input",
        "transformer.h.1.mlp.act:input",
    ]
    assert names(resolve_sites(model, ["transformer.h.1", SITE, "transformer.h.?.mlp.act"])) == [
        SITE,
        "transformer.h.1.mlp.act",
        "transformer.h.1",
    ]


def test_an_unknown_site_is_answered_with_the_nearest_names(model):
    with pytest.raises(
        UserError, match=r"no site 'transformer\.h\.0\.mlp\.akt'. Nearest: .*transformer\.h\.0\.mlp\.act"
    ):
        resolve_sites(model, [SITE, "transformer.h.0.mlp.akt"])


def test_what_is_read_is_what_the_module_gives_and_gets(model):
    seen = {}
    module = model.get_submodule(SITE)
    handle = module.register_forward_hook(lambda _, inputs, output: seen.update({"in": inputs[0], "out": output}))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    got = read(model, [SITE, f"{SITE}:input"])
    torch.testing.assert_close(got[SITE], seen["out"], rtol=0, atol=0)
    torch.testing.assert_close(got[f"{SITE}:input"], seen["in"], rtol=0, atol=0)


def test_a_module_that_gives_a_tuple_is_read_and_replaced_at_its_first_item(model):
    attention = "transformer.h.0.attn"
    assert isinstance(_output_of(model, attention), tuple)
    got = read(model, [attention])[attention]
    torch.testing.assert_close(got, _output_of(model, attention)[0], rtol=0, atol=0)
    with spliced(model, attention, attention, _zeros):
        assert (_output_of(model, attention)[0] == 0).all()


def _output_of(model, name, ids=IDS):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def test_several_sites_in_one_pass_equal_one_pass_each(model):
    both = read(model, ["transformer.h.*.mlp.act"])
    for name, value in both.items():
        torch.testing.assert_close(value, read(model, [name])[name], rtol=0, atol=0)


def test_the_pass_stops_after_the_deepest_site(model):
    ran = []
    with contextlib.closing(SiteReader(model, resolve_sites(model, [SITE]))) as reader, contextlib.ExitStack() as hooks:
        for name in ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.h.1", "lm_head"):
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_hook(lambda *_, name=name: ran.append(name)).remove)
        reader.read(IDS, None)
    assert ran == ["transformer.h.0.mlp.c_fc"]


def test_threads_may_share_a_reader(model):
    batches = [torch.randint(0, 300, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(12)]
    sites = resolve_sites(model, ["transformer.h.*.mlp.act"])
    with contextlib.closing(SiteReader(model, sites)) as reader, ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda ids: reader.read(ids, None), batches))
        for ids, got in zip(batches, together, strict=True):
            for name, value in reader.read(ids, None).items():
                torch.testing.assert_close(got[name], value)


def test_a_closed_reader_leaves_the_model_as_it_was(model):
    with torch.no_grad():
        before = model(IDS).logits
        read(model, [SITE])
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)


def test_padding_at_the_end_changes_nothing_before_it(model):
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    padded = read(model, [SITE], mask=mask)[SITE]
    torch.testing.assert_close(padded[0, :3], read(model, [SITE], IDS[:1, :3])[SITE][0])


@pytest.mark.parametrize("site", [SITE, f"{SITE}:input", "transformer.h.0", "transformer.h.1.ln_2:input"])
def test_replacing_a_site_with_itself_changes_nothing_and_with_zeros_does(model, site):
    with torch.no_grad():
        plain = model(IDS).logits
        with spliced(model, site, site, lambda x, there: x.clone()):
            torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=0)
        with spliced(model, site, site, _zeros):
            assert not torch.allclose(model(IDS).logits, plain)
        torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=0)


def test_what_is_spliced_in_is_what_later_modules_get(model):
    with torch.no_grad(), spliced(model, SITE, SITE, lambda x, there: torch.full_like(x, 3.0)):
        assert (read(model, ["transformer.h.0.mlp.c_proj:input"])["transformer.h.0.mlp.c_proj:input"] == 3.0).all()


def test_a_replacement_is_taken_back_after_an_error(model):
    with torch.no_grad():
        plain = model(IDS).logits
        with pytest.raises(RuntimeError), spliced(model, SITE, SITE, _zeros):
            raise RuntimeError
        torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("site", "target"),
    [
        ("transformer.h.0.mlp:input", "transformer.h.0.mlp"),
        ("transformer.h.0", "transformer.h.1.attn"),
        (SITE, SITE),
        ("transformer.h.0:input", "transformer.h.0.mlp"),
    ],
)
def test_a_splice_gets_what_was_read_in_the_same_pass_and_what_is_there(model, site, target):
    wanted = [read(model, [site], ids)[site] for ids in (IDS, IDS + 1)]
    there = [read(model, [target], ids)[target] for ids in (IDS, IDS + 1)]
    seen = []

    def change(x, y):
        seen.append((x.clone(), y.clone()))
        return torch.full_like(y, 2.0)

    require_running_order(model, site, target)
    with torch.no_grad(), spliced(model, site, target, change):
        for ids in (IDS, IDS + 1):
            given = _output_of(model, target, ids)
            assert ((given[0] if isinstance(given, tuple) else given) == 2.0).all()
    for (x, y), a, b in zip(seen, wanted, there, strict=True):
        torch.testing.assert_close(x, a, rtol=0, atol=0)
        torch.testing.assert_close(y, b, rtol=0, atol=0)
    torch.testing.assert_close(read(model, [target])[target], there[0], rtol=0, atol=0)


def test_threads_that_share_a_splice_do_not_see_each_others_activations(model):
    @torch.no_grad()
    def logits(ids):
        return model(ids).logits

    batches = [(IDS + n) % 300 for n in range(24)]
    with spliced(model, "transformer.h.0", "transformer.h.1", lambda x, y: x + 0 * y):
        alone = [logits(ids) for ids in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(logits, batches))
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_target_that_runs_before_what_is_read_is_refused_by_both_names(model):
    with pytest.raises(UserError, match=r"sae\.target_site is 'transformer\.h\.0', .* sae\.site, 'transformer\.h\.1'"):
        require_running_order(model, "transformer.h.1", "transformer.h.0")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_no_model_is_said_plainly(tmp_path, load):
    with pytest.raises(UserError, match=r"model\.path is .*: a folder without a Hugging Face model .*\n.*config\.json"):
        load(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"neither a local folder nor a model on the hub"):
        load(ModelConfig(path="nobody/there-is-no-such-model"))


def test_a_damaged_config_is_said_plainly(tmp_path, ingredients):
    shutil.copytree(ingredients.model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "no such kind"}))
    with pytest.raises(UserError, match=r"model\.path is"):
        load_model(ModelConfig(path=str(tmp_path / "model")))


def test_the_model_keeps_the_precision_asked_for_and_is_frozen(ingredients):
    model = load_model(ModelConfig(path=str(ingredients.model), dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(ingredients):
    with pytest.raises(UserError, match=r"model\.device is 'cuda'.*\"cpu\""):
        load_model(ModelConfig(path=str(ingredients.model), device="cuda"))


def test_the_fingerprint_follows_the_files_and_not_the_folder(tmp_path, ingredients):
    shutil.copytree(ingredients.model, tmp_path / "copy")
    here, there = (ModelConfig(path=str(path)) for path in (ingredients.model, tmp_path / "copy"))
    assert model_fingerprint(here) == model_fingerprint(there)
    assert model_fingerprint(here) != model_fingerprint(here.model_copy(update={"dtype": "bfloat16"}))
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    assert model_fingerprint(here) != model_fingerprint(there)
