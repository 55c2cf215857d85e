"""Load a language model or its tokenizer, from a folder, a GGUF file or the hub; and say which it is."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from saeflow.corpus.files import is_lfs_pointer
from saeflow.corpus.remote import hub_errors
from saeflow.recipe.data_settings import ModelConfig
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.recipe import Recipe
from saeflow.runtime.devices import choose_device
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.memory import total_memory
from saeflow.store.files import checksum_once

_IDENTITY_FILES = (
    "*.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "*.txt", "*.spm", "*.codes", "*.tiktoken",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin")
_HUB_SECONDS = 10.0
_DAMAGED = (SafetensorError, UnpicklingError, EOFError)
"""What the readers of weights raise where a file is cut or changed."""

_OLD_BUFFERS = {"masked_bias", "inv_freq", "position_ids", "relative_position_index"}
"""Tensors in files of earlier versions of transformers that a model now works out itself."""


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's own tokenizer. Raises UserError if there is none: some classes then know special tokens alone,
    or the mark of a word's beginning, and would read any text as unknown."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, config)
    added = tokenizer.added_tokens_decoder
    if not {name for name, i in tokenizer.get_vocab().items() if i not in added} - {"▁"}:
        raise UserError(
            f"model.path is {config.path!r}: its tokenizer is empty, as its files are missing.\n"
            "Put tokenizer.json, or vocab.json and merges.txt, or tokenizer.model beside config.json."
        )
    return tokenizer


def load_model(config: ModelConfig) -> nn.Module:
    """Load the model with the head it was trained with, in eval mode on its device. Raises UserError without one."""
    import transformers

    _refuse_adapter(config.path)
    about = _load(transformers.AutoConfig.from_pretrained, config)
    own_code = getattr(about, "auto_map", None)
    if isinstance(own_code, dict) and any("Model" in name for name in own_code) and _class_named_in(about) is None:
        raise UserError(_needs_code(config.path))
    fallback = transformers.AutoModelForCausalLM if is_gguf(config.path) else transformers.AutoModel
    options = {"dtype": getattr(torch, config.dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = _load((_class_named_in(about) or fallback).from_pretrained, config, **options)
    _require_whole(config.path, model, report)
    ready: nn.Module = model.eval().requires_grad_(False).to(choose_device("model.device", config.device))
    return ready


def _class_named_in(about: Any) -> Any:
    """Return the class of model that a configuration names; None if it names none that transformers has."""
    import transformers

    named = getattr(about, "architectures", None)
    first = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _refuse_adapter(path: str) -> None:
    if (Path(path) / "adapter_config.json").exists():
        raise UserError(
            f"model.path is {path!r}: it holds an adapter of PEFT, which saeflow does not apply.\n"
            "Merge it into its model and save that: model.merge_and_unload().save_pretrained(FOLDER)."
        )


def _require_whole(path: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Raises UserError if weights of the model were not among those of the files: they would be random numbers. Or if
    the files hold more of its layers than it has: it would be another model.

    A pooler may be missing: it is trained only with some heads, and no other module reads from it.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    missing = sorted(name for name in set(report["missing_keys"]) - tied if "pooler" not in name.split("."))
    unlike = sorted(name if isinstance(name, str) else name[0] for name in report.get("mismatched_keys", ()))
    if not missing and not unlike:
        return _refuse_more(path, model, report["unexpected_keys"])
    n_weights = len(model.state_dict())
    what = f"{len(missing or unlike)} of {n_weights} weights are " + ("missing" if missing else "of another shape")
    others = ", ".join(sorted(report["unexpected_keys"])[:3])
    raise UserError(
        f"model.path is {path!r}: {what} in its files, e.g. {', '.join((missing or unlike)[:3])}"
        f"{f'; not understood: {others}' if others else ''}.\n"
        "Save the model itself with save_pretrained, not one that is compiled, wrapped or cut, and fetch every file."
    )


def _refuse_more(path: str, model: nn.Module, unexpected: Iterable[str]) -> None:
    """Raise UserError if a weight of the files belongs into a numbered layer, or after the last one. A head may be
    left over, and what earlier versions of transformers saved of each layer."""
    modules, weights = dict(model.named_modules()), model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = []
    for name in sorted(unexpected):
        for here in (name, prefix + name, name.removeprefix(prefix)):
            stack, (owner, _, leaf) = re.match(r"(.+?)\.\d+\.", here), here.rpartition(".")
            is_mask = leaf == "bias" and owner in modules and f"{owner}.weight" not in weights  # GPT-2's causal mask
            if stack and isinstance(modules.get(stack[1]), nn.ModuleList) and not (is_mask or leaf in _OLD_BUFFERS):
                found.append(name)
                break
    if found:
        raise UserError(
            f"model.path is {path!r}: the model that config.json describes has no place for {len(found)} weights of "
            f"its files, e.g. {', '.join(found[:3])}.\nBring the config.json that was saved with these weights; merge "
            "adapters into the model before saving it."
        )


def may_run(recipe: Recipe, *sites: str) -> bool:
    """True if stages run the recipe's language model.

    Where an engine has run it, only if its weights lie in a local folder and fit into half of the memory, and if it
    has these sites.
    """
    if recipe.model is None or recipe.corpus is None or recipe.corpus.requests is None:
        return recipe.model is not None
    path = Path(recipe.model.path)
    files = [path] if path.is_file() else [file for ending in _WEIGHTS for file in path.glob(ending)]
    fits = 0 < sum(file.stat().st_size for file in files) < total_memory() // 2
    return fits and set(sites) <= set(site_names(recipe.model))


@cache
def site_names(config: ModelConfig) -> list[str]:
    """Return the names of the model's modules and of their inputs. Loads no weights; empty without a config.json."""
    import transformers

    with contextlib.suppress(Exception), torch.device("meta"):  # some models cannot be built without weights
        about = _load(transformers.AutoConfig.from_pretrained, config)
        named = _class_named_in(about)
        model: nn.Module = named(about) if named else transformers.AutoModel.from_config(about)
        return [site for name, _ in model.named_modules() if name for site in (name, f"{name}:input")]
    return []


def is_gguf(path: str) -> bool:
    """True for a single file of quantised weights with its tokenizer, as llama.cpp keeps them."""
    return path.endswith(".gguf")


def _load(loader: Callable[..., Any], config: ModelConfig, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, local = Path(config.path), Path(config.path).exists()
    revision, online = (config.revision, False) if local else _commit(config.path, config.revision)
    options |= {"revision": revision, "trust_remote_code": False, "local_files_only": not online}
    if is_gguf(config.path):
        options["gguf_file"] = path.name
    try:
        with warnings.catch_warnings(), _silent_gguf() if is_gguf(config.path) else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            return loader(str(path.parent) if is_gguf(config.path) else config.path, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a file that says nonsense raises any error of transformers and of its parts
        raise UserError(_why_not(config.path, local, error)) from error


@contextlib.contextmanager
def _silent_gguf() -> Iterator[None]:
    """Hide the bar that transformers shows for GGUF files. Its own switch does not turn that off."""
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown = reading.tqdm
    reading.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        reading.tqdm = shown


def _why_not(path: str, local: bool, error: Exception) -> str:
    """Say why a model was not loaded, and the way out."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    said = f"model.path is {path!r}"
    reason = f"no entry {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
    if reason.rstrip().endswith(":"):
        reason = " ".join(str(error).split())[:300]
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{said}: its owner lets in only those who accepted the licence.\n"
            f"Accept it at https://huggingface.co/{path} and set HF_TOKEN to a token of that account."
        )
    if isinstance(error, ImportError) and is_gguf(path):
        return f"{said}: GGUF files need two more packages. Install them: pip install 'accelerate>=1.0' 'gguf>=0.17'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        reason = "the hub has no such model, or a private one that HF_TOKEN does not open"
    if pointer := _lfs_pointer(Path(path)):
        return f"{said}: {pointer} in it is a pointer of git-lfs, not the file itself. Fetch it with `git lfs pull`."
    if Path(path).is_file() and not is_gguf(path):
        return f"{said}: that is a file. Name the folder it lies in, with config.json and tokenizer.json."
    if isinstance(error, _DAMAGED):
        reason = "PyTorch reads no weights from them" if isinstance(error, UnpicklingError) else reason
        return f"{said}: its weights are damaged or cut ({reason}).\nFetch every file again."
    if "custom code" in str(error):
        return _needs_code(path)
    if isinstance(error, ImportError):
        return f"{said}: it needs a package that is not installed ({reason}).\nInstall it, or name a model without."
    if (Path(path) / "config.json").exists() or is_gguf(path):
        return f"{said}: its files give no model ({reason}).\nFetch every file again, or save the model once more."
    what = "a folder without a Hugging Face model" if local else "neither a local folder nor a model on the hub"
    return (
        f"{said}: {what} ({reason}).\nName a folder with config.json, model.safetensors and tokenizer.json, "
        "a .gguf file, or a hub name such as openai/gpt2."
    )


def _needs_code(path: str) -> str:
    return (
        f"model.path is {path!r}: it needs Python code of its own (auto_map), which saeflow does not run.\n"
        "Name a model that transformers itself has the code of, or save it as one."
    )


def _lfs_pointer(folder: Path) -> str | None:
    """Return the name of a file of the model that is only a pointer to its content."""
    files = (path for pattern in _IDENTITY_FILES for path in sorted(folder.glob(pattern)))
    return next((path.name for path in files if is_lfs_pointer(path)), None)


def model_fingerprint(config: ModelConfig) -> str:
    """Return a hash of the files of a local model, or of the commit of one on the hub."""
    folder = Path(config.path)
    if folder.is_file():
        return fingerprint(folder.name, checksum_once(folder), config.dtype)
    if folder.is_dir():
        files = {path for pattern in _IDENTITY_FILES for path in folder.glob(pattern)} | _shards_below(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in files if path.is_file())
        return fingerprint([(name, checksum_once(folder / name)) for name in names], config.dtype)
    return fingerprint(config.path, _commit(config.path, config.revision)[0], config.dtype)


def model_on_this_machine(config: ModelConfig) -> tuple[ModelConfig, str] | None:
    """Return a model where its files lie, and its fingerprint, without a word to the hub; None if it is not here."""
    if Path(config.path).exists():
        return config, model_fingerprint(config)
    if (folder := _downloaded(config.path, config.revision)) is None:
        return None
    found = config.model_copy(update={"path": str(folder), "revision": None})
    return found, fingerprint(config.path, folder.name, config.dtype)


def _shards_below(folder: Path) -> set[Path]:
    """Return the files of weights that an index names in another folder."""
    found = set()
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # one that cannot be read loads no model
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            found |= {folder / name for name in names if "/" in name}
    return found


@cache
def _commit(path: str, revision: str | None) -> tuple[str, bool]:
    """Return the commit of a model on the hub, or the one downloaded before, and True if the hub answered.

    The hub is asked once a process: what is loaded later must be what the fingerprint stands for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    failures: tuple[type[Exception], ...] = (*hub_errors(), OSError, ValueError, RuntimeError)
    try:
        commit = str(HfApi().model_info(path, revision=revision, timeout=_HUB_SECONDS).sha)
    except failures as error:
        cached = _downloaded(path, revision)
        if cached is None or isinstance(error, HfHubHTTPError):
            raise UserError(_why_not(path, False, error)) from error
        return cached.name, False
    _note_commit(path, revision, commit)
    return commit, True


def _note_commit(path: str, revision: str | None, commit: str) -> None:
    """Note in the hub's cache which commit a branch or tag is. The hub does so only for what is asked by name."""
    from huggingface_hub import constants, file_download

    if revision != commit:
        folder = Path(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=path, repo_type="model"))
        note = folder / "refs" / (revision or "main")
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit)


def _downloaded(path: str, revision: str | None) -> Path | None:
    """Return the folder in the hub's cache, named by its commit, that a branch, tag or commit stands for."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no name of a model
        found = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
