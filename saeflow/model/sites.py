"""Language models: load one, name its sites, read or replace what a module gives."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeflow.corpus.remote import hub_errors
from saeflow.recipe.fingerprint import fingerprint
from saeflow.recipe.settings import ModelConfig, SAEConfig
from saeflow.runtime.devices import choose_device, to_device
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.suggest import nearest
from saeflow.store.files import checksum

_IDENTITY_FILES = ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "*.txt")


@dataclass(frozen=True)
class Site:
    """A module whose output, or input (`name:input`), is a vector at every token."""

    name: str
    width: int

    @property
    def file(self) -> str:
        return f"{self.name.replace(':', '.')}.zarr"


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's own tokenizer. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, config)


def load_model(config: ModelConfig) -> nn.Module:
    """The model with the head it was trained with, in eval mode on its device.

    Raises UserError for a path that holds no model.
    """
    import transformers

    about = _load(transformers.AutoConfig.from_pretrained, config)
    named = getattr(about, "architectures", None) or []
    loader = getattr(transformers, named[0], None) if named else None
    fallback = transformers.AutoModelForCausalLM if is_gguf(config.path) else transformers.AutoModel
    model = _load((loader or fallback).from_pretrained, config, dtype=getattr(torch, config.dtype))
    ready: nn.Module = model.eval().requires_grad_(False).to(choose_device("model.device", config.device))
    return ready


def is_gguf(path: str) -> bool:
    """A single file of quantised weights with its tokenizer, as llama.cpp keeps them."""
    return path.endswith(".gguf")


def _load(loader: Callable[..., Any], config: ModelConfig, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, local = Path(config.path), Path(config.path).exists()
    revision, online = (config.revision, False) if local else _commit(config.path, config.revision)
    options |= {"revision": revision, "trust_remote_code": False, "local_files_only": not online}
    if is_gguf(config.path):
        options["gguf_file"] = path.name
    known = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError)
    failures: tuple[type[Exception], ...] = (*hub_errors(), *known)
    try:
        with warnings.catch_warnings(), _silent_gguf() if is_gguf(config.path) else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            return loader(str(path.parent) if is_gguf(config.path) else config.path, **options)
    except failures as error:
        raise UserError(_why_not(config.path, local, error)) from error


@contextlib.contextmanager
def _silent_gguf() -> Iterator[None]:
    """transformers shows a bar for GGUF files that its own switch does not turn off."""
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown = reading.tqdm
    reading.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        reading.tqdm = shown


def _why_not(path: str, local: bool, error: Exception) -> str:
    """Why a model was not loaded, and the way out."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    said = f"model.path is {path!r}"
    reason = first_line(error)
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{said}: its owner lets in only those who accepted the licence.\n"
            f"Accept it at https://huggingface.co/{path} and set HF_TOKEN to a token of that account."
        )
    if isinstance(error, ImportError) and is_gguf(path):
        return f"{said}: GGUF files need two more packages. Install them: pip install 'saeflow[gguf]'"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        reason = "the hub has no such model, or a private one that HF_TOKEN does not open"
    what = "a folder without a Hugging Face model" if local else "neither a local folder nor a model on the hub"
    return (
        f"{said}: {what} ({reason}).\nName a folder with config.json, model.safetensors and tokenizer.json, "
        "a .gguf file, or a hub name such as openai/gpt2."
    )


def model_fingerprint(config: ModelConfig) -> str:
    """Stands for the files of a local model, or for the commit of one on the hub."""
    folder = Path(config.path)
    if folder.is_file():
        return fingerprint(folder.name, _known_checksum(folder, folder.stat().st_mtime_ns), config.dtype)
    if folder.is_dir():
        files = sorted({path for pattern in _IDENTITY_FILES for path in folder.glob(pattern)})
        return fingerprint(
            [(path.name, _known_checksum(path, path.stat().st_mtime_ns)) for path in files], config.dtype
        )
    return fingerprint(config.path, _commit(config.path, config.revision)[0], config.dtype)


_HUB_SECONDS = 10.0


@cache
def _commit(path: str, revision: str | None) -> tuple[str, bool]:
    """The commit of a model on the hub, and whether the hub answered; if not, the commit that was downloaded before.

    Asked once a process: what is loaded later must be what the fingerprint stands for.
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
        return cached, False
    _note_commit(path, revision, commit)
    return commit, True


def _cache_folder(path: str) -> Path:
    from huggingface_hub import constants, file_download

    return Path(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=path, repo_type="model"))


def _note_commit(path: str, revision: str | None, commit: str) -> None:
    """Where the hub's cache keeps which commit a branch or tag is; it does so itself only for what is asked by name."""
    if revision != commit:
        note = _cache_folder(path) / "refs" / (revision or "main")
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit)


def _downloaded(path: str, revision: str | None) -> str | None:
    """The commit in the hub's cache that a branch, tag or commit stands for."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no name of a model
        found = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


@lru_cache(maxsize=256)
def _known_checksum(path: Path, changed_ns: int) -> str:
    """Checksum of a file, computed once as long as it does not change: weights are large and asked for often."""
    return checksum(path)


def list_sites(model: nn.Module) -> list[Site]:
    """Every module that gives one vector a token, in the order they run; widths by a small trial."""
    found: dict[str, int] = {}
    batch, length = 2, 3

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for label, value in ((f"{name}:input", inputs), (name, output)):
                tensor = _tensor(value)
                if tensor is not None and tensor.dim() == 3 and tensor.shape[:2] == (batch, length):
                    found.setdefault(label, tensor.shape[2])

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(note(name)).remove)
        try:
            model(torch.zeros(batch, length, dtype=torch.int64, device=device_of(model)))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"model.path: a {type(model).__name__} needs more than the tokens of a text ({error}).\n"
                "Name a decoder, such as GPT-2, or an encoder, such as BERT."
            ) from error
    return [Site(name, width) for name, width in found.items()]


@torch.no_grad()
def require_length(model: nn.Module, length: int, sites: list[Site]) -> None:
    """Raises UserError where the model cannot read sequences of `length` tokens: by its settings, or by trial."""
    limit = getattr(model.config, "max_position_embeddings", None) or length
    said = f"tokens.context_length is {length}, but the model reads"
    if length > limit:
        raise UserError(f"{said} at most {limit} tokens. Set at most {limit}.")
    try:
        with contextlib.closing(SiteReader(model, sites)) as reader:
            reader.read(torch.zeros(1, length, dtype=torch.int64), None)
    except (IndexError, RuntimeError) as error:  # some keep a few positions for themselves
        if "allocate" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"{said} fewer ({first_line(error)}). Set less, such as {limit - 2}.") from error


@torch.no_grad()
def predicts_next_token(model: nn.Module) -> bool:
    """Has the model logits over its vocabulary that later tokens do not change? Encoders and headless models have
    not."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return False
    vocab_ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device_of(model))
    logits = getattr(model(vocab_ids), "logits", None)
    if logits is None:
        return False
    first, second = logits.float()
    return torch.allclose(first[:-1], second[:-1], rtol=1e-3, atol=1e-3)


def resolve_sites(model: nn.Module, patterns: list[str]) -> list[Site]:
    """The sites that dotted names or globs stand for, in running order.

    Raises UserError with the nearest names for a pattern that matches nothing.
    """
    known = list_sites(model)
    names = [site.name for site in known]
    chosen: set[str] = set()
    for pattern in patterns:
        wants_input = pattern.endswith(":input")
        matches = [name for name in fnmatch.filter(names, pattern) if name.endswith(":input") == wants_input]
        if not matches:
            near = nearest(pattern, names)
            raise UserError(
                f"activations.sites: the model has no site {pattern!r}. Nearest: {', '.join(near) or 'none'}.\n"
                "List them all with `saeflow sites MODEL`."
            )
        chosen.update(matches)
    return [site for site in known if site.name in chosen]


def choose_site(sites: list[Site], wanted: str | None, setting: str = "sae.site") -> Site:
    """The site of this name. Raises UserError where there is none, and where none is named and there are several."""
    found = [site for site in sites if site.name == wanted] if wanted else sites
    if len(found) != 1:
        names = [site.name for site in sites]
        near = nearest(wanted or "", names, n=1)
        hint = f" Nearest: {near[0]}." if near else ""
        raise UserError(
            f"{setting} is {wanted!r}; the sites are: {', '.join(names)}.{hint} Set {setting} to one of them."
        )
    return found[0]


def site_pair(sites: list[Site], config: SAEConfig) -> tuple[Site, Site]:
    """The site that an SAE reads and the one that it reconstructs: another one only for a transcoder."""
    read = choose_site(sites, config.site)
    if not config.target_site:
        return read, read
    target = choose_site(sites, config.target_site, "sae.target_site")
    if target == read:
        raise UserError(
            f"sae.target_site is {target.name}, the site that is read: that is no transcoder.\n"
            "Leave sae.target_site out."
        )
    return read, target


class _Reached(Exception):
    """The deepest wanted site has run; nothing after it is needed."""


class SiteReader:
    """Runs a model up to the deepest of `sites` and returns what each gave. Several threads may share one."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self.model, self.sites = model, sites
        self._here = threading.local()
        self._hooks = [_hook(model, site.name, self._take) for site in sites]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, value: Any) -> None:
        tensor = _tensor(value)
        assert tensor is not None
        self._here.read[name] = tensor
        if len(self._here.read) == len(self.sites):
            raise _Reached

    @torch.no_grad()
    def read(self, vocab_ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Activations (B, T, D) by site, in the model's precision, on its device.

        vocab_ids (B, T) int64; mask (B, T) bool, True at real tokens, or None where all are.
        """
        self._here.read = {}
        place = device_of(self.model)
        with contextlib.suppress(_Reached):
            self.model(to_device(vocab_ids, place), attention_mask=None if mask is None else to_device(mask, place))
        return dict(self._here.read)


@contextlib.contextmanager
def spliced(model: nn.Module, read: str, target: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While open, what the module gives (or gets) at `target` is `change(what is at read in the same pass, it)`.

    `read` and `target` may be one site; else the model must run `read` first (`require_running_order`). Several
    threads may run the model.
    """
    here = threading.local()

    def note(name: str, value: Any) -> None:
        here.read = _tensor(value)

    def put(name: str, value: Any) -> Any:
        return _with_tensor(value, lambda x: change(here.read, x))

    handles = [_hook(model, read, note), _hook(model, target, put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def require_running_order(model: nn.Module, read: str, target: str) -> None:
    """Raises UserError where a transcoder's target runs before what it reads, by a small trial."""
    reached: list[str] = []
    with contextlib.ExitStack() as stack:
        for site in (read, target):
            stack.callback(_hook(model, site, lambda name, value: reached.append(name)).remove)
        model(torch.zeros(1, 2, dtype=torch.int64, device=device_of(model)))
    if read != reached[0]:
        raise UserError(
            f"sae.target_site is {target!r}, which the model runs before sae.site, {read!r}:\n"
            "nothing can take its place in time. Set sae.site to a site that runs before sae.target_site."
        )


def _hook(model: nn.Module, site: str, act: Callable[[str, Any], Any]) -> Any:
    name, _, side = site.partition(":")
    module = model.get_submodule(name)
    if side == "input":
        return module.register_forward_pre_hook(lambda module, inputs: act(site, inputs))
    return module.register_forward_hook(lambda module, inputs, output: act(site, output))


def _tensor(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, Tensor) else None


def _with_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return (change(value[0]), *value[1:])
    return change(value)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
