"""Sites of a language model: name them, read or replace what a module gives."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeflow.model.hook_names import site_of_hook
from saeflow.recipe.settings import SAEConfig
from saeflow.runtime.devices import to_device
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import nearest


@dataclass(frozen=True)
class Site:
    """A module whose output, or input (`name:input`), is a vector at every token."""

    name: str
    width: int

    @property
    def file(self) -> str:
        return f"{self.name.replace(':', '.')}.zarr"


def list_sites(model: nn.Module) -> list[Site]:
    """Find every module that gives one vector a token, in the order they run, by a small trial.

    A module that runs several times in a pass, as ALBERT's one layer does, gives several and is left out. So is the
    decoder of a model with an encoder: it gets the tokens shifted by one, and predicts those that it is given.
    """
    return [Site(name, widths[0]) for name, widths in _trial(model).items() if len(widths) == 1]


def _trial(model: nn.Module) -> dict[str, list[int]]:
    """Return the width of what each module took (`name:input`) and gave, once for each time it ran."""
    found: dict[str, list[int]] = {}
    batch, length = 2, 3
    decoders: list[nn.Module] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for label, value in ((f"{name}:input", inputs), (name, output)):
                tensor = _tensor(value)
                if tensor is not None and tensor.dim() == 3 and tensor.shape[:2] == (batch, length) and not decoders:
                    found.setdefault(label, []).append(tensor.shape[2])

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            decoder: Any = model.get_decoder()  # type: ignore[operator]
            stack.callback(decoder.register_forward_pre_hook(lambda *_: decoders.append(decoder)).remove)
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(note(name)).remove)
        try:
            model(torch.zeros(batch, length, dtype=torch.int64, device=device_of(model)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models of pictures, sounds or two texts raise any error of their own
            raise UserError(
                f"model.path: a {type(model).__name__} needs more than the tokens of a text ({first_line(error)}).\n"
                "Name a decoder, such as GPT-2, or an encoder, such as BERT. Of a larger model, save the part that "
                "reads text alone, such as T5EncoderModel or CLIPTextModel."
            ) from error
    return found


@torch.no_grad()
def require_length(model: nn.Module, length: int, sites: list[Site]) -> None:
    """Raise UserError if the model cannot read sequences of `length` tokens, by its settings or by trial."""
    limit = getattr(model.config, "max_position_embeddings", None) or length
    limit = limit if limit > 0 else length  # XLNet says -1: it has no limit
    said = f"tokens.context_length is {length}, but the model reads"
    if length > limit:
        raise UserError(f"{said} at most {limit} tokens. Set at most {limit}.")
    try:
        with contextlib.closing(SiteReader(model, sites)) as reader:
            reader.read(torch.zeros(1, length, dtype=torch.int64), None)
    except (IndexError, RuntimeError, ValueError) as error:  # some keep a few positions for themselves
        if "allocate" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"{said} fewer ({first_line(error)}). Set less, such as {limit - 2}.") from error


@torch.no_grad()
def predicts_next_token(model: nn.Module) -> bool:
    """True if the model has logits that later tokens do not change. Encoders and headless models have none."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return False
    vocab_ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=device_of(model)) % (embedding_size(model) or 5)
    logits = getattr(model(vocab_ids), "logits", None)
    if logits is None:
        return False
    difference = (logits[0].float() - logits[1].float()).abs()
    return bool(difference[:-1].max() <= 1e-4 * difference[-1].max())


def embedding_size(model: nn.Module) -> int | None:
    """Return the number of vocabulary ids that the model has a row for; None if it has no table of them."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        return int(weight.shape[0])
    return None


def run_on(model: nn.Module, vocab_ids: Tensor, mask: Tensor | None) -> Any:
    """Run the model on ids (B, T). `mask` (B, T) is True at real tokens; padding that has no embedding is fed as 0."""
    place = device_of(model)
    if mask is None:
        return model(to_device(vocab_ids, place), attention_mask=None)
    n_rows = embedding_size(model)
    known = vocab_ids if n_rows is None else vocab_ids.masked_fill(~mask & (vocab_ids >= n_rows), 0)
    inputs, attended = to_device(known, place), to_device(mask, place)
    try:
        return model(inputs, attention_mask=attended)
    except RuntimeError as error:
        if "bool tensor" not in str(error):
            raise
        return model(inputs, attention_mask=attended.long())  # XLNet subtracts masks


def resolve_sites(model: nn.Module, patterns: list[str]) -> list[Site]:
    """Return the sites of dotted names, globs or names of TransformerLens, in running order. Raises UserError for one
    that matches nothing."""
    known = list_sites(model)
    names = [site.name for site in known]
    chosen: set[str] = set()
    for pattern in patterns:
        wants_input = pattern.endswith(":input")
        matches = [name for name in fnmatch.filter(names, pattern) if name.endswith(":input") == wants_input]
        if not matches and (meant := site_of_hook(pattern, names)):
            matches = [meant]
        if not matches:
            if many := fnmatch.filter((name for name, widths in _trial(model).items() if len(widths) > 1), pattern):
                raise UserError(
                    f"activations.sites: {many[0]} runs several times in one pass of the model, so it has several "
                    "activations a token.\nName a module that runs once: `saeflow sites MODEL` lists them."
                )
            near = nearest(pattern, names)
            raise UserError(
                f"activations.sites: the model has no site {pattern!r}. Nearest: {', '.join(near) or 'none'}.\n"
                "List them all with `saeflow sites MODEL`."
            )
        chosen.update(matches)
    return [site for site in known if site.name in chosen]


def choose_site(sites: list[Site], wanted: str | None, setting: str = "sae.site") -> Site:
    """Return the site of this name, or the only one. Raises UserError if there is none, or several."""
    names = [site.name for site in sites]
    if wanted and wanted not in names:
        wanted = site_of_hook(wanted, names) or wanted
    found = [site for site in sites if site.name == wanted] if wanted else sites
    if len(found) != 1:
        near = nearest(wanted or "", names, n=1)
        hint = f" Nearest: {near[0]}." if near else ""
        raise UserError(
            f"{setting} is {wanted!r}; the sites are: {', '.join(names)}.{hint} Set {setting} to one of them."
        )
    return found[0]


def site_pair(sites: list[Site], config: SAEConfig) -> tuple[Site, Site]:
    """Return the site that an SAE reads and the one that it reconstructs: another one only for a transcoder."""
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
    """Run a model up to the deepest of `sites` and return what each gave.

    Several threads may share one, and a model may have several.
    """

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        self.model, self.sites = model, sites
        self._here = threading.local()
        self._hooks = [_hook(model, site.name, self._take) for site in sites]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, value: Any) -> None:
        if getattr(self._here, "read", None) is None:  # another reader's pass
            return
        tensor = _tensor(value)
        assert tensor is not None
        is_last = len(self._here.read) == len(self.sites) - 1
        self._here.read[name] = tensor if is_last else tensor.clone()  # Falcon adds to it where it lies
        if is_last:
            raise _Reached

    @torch.no_grad()
    def read(self, vocab_ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return activations (B, T, D) by site, in the model's precision, on its device.

        `vocab_ids` (B, T) are int64. `mask` (B, T) is True at real tokens, or None if all are real.
        """
        read = self._here.read = dict[str, Tensor]()
        try:
            with contextlib.suppress(_Reached):
                run_on(self.model, vocab_ids, mask)
        finally:
            self._here.read = None
        return read


@contextlib.contextmanager
def spliced(model: nn.Module, read: str, target: str, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While open, replace the value at `target` by `change(value at read in the same pass, value at target)`.

    The model must run `read` first, unless both are one site. Several threads may run the model.
    """
    here = threading.local()

    def note(name: str, value: Any) -> None:
        tensor = _tensor(value)
        here.read = tensor if tensor is None or read == target else tensor.clone()

    def put(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            changed = (change(here.read, value[0]), *value[1:])
            return type(value)(*changed) if hasattr(value, "_fields") else changed  # Reformer's tuple has names
        return change(here.read, value)

    handles = [_hook(model, read, note), _hook(model, target, put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def require_running_order(model: nn.Module, read: str, target: str) -> None:
    """Raise UserError if a transcoder's target runs before what it reads, by a small trial."""
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


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
