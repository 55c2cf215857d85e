"""Autoencoders by name: OWNER/REPOSITORY/FOLDER on the Hugging Face hub, or RELEASE/SAE of SAELens' catalogue."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from saeflow.corpus.remote import hub_errors
from saeflow.runtime.errors import UserError, first_line
from saeflow.runtime.text import nearest

_HUB_NAME = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?((?:/[^/@]+)*)/?")
_WEIGHT_ENDINGS = (".json", ".safetensors", ".npz", ".pt", ".pth")


def locate(source: str) -> tuple[Path, Mapping[str, Any]]:
    """Return the folder or file of an autoencoder, downloaded if it is a name, and what a catalogue says of it."""
    path = Path(source)
    if path.exists() or path.is_absolute() or source.startswith("."):
        return path, {}
    release, _, sae = source.partition("/")
    if about := _catalogue().get(release):
        return _of_release(release, sae, about)
    name = _HUB_NAME.fullmatch(source)
    if name and ".." in source.split("/"):
        raise UserError(f"sae.source is {source}: a folder of a repository is named without `..`.")
    return (_download_folder(name[1], name[2], name[3].strip("/")), {}) if name else (path, {})


def _of_release(release: str, sae: str, about: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any]]:
    known = {str(each.get("id")): each for each in about.get("saes", [])}
    if sae not in known:
        near = nearest(sae, list(known)) or list(known)[:5]
        raise UserError(
            f"sae.source is {release}/{sae}, but SAELens' catalogue has no {sae!r} there. Nearest: {', '.join(near)}."
        )
    card = {name: value for name, value in known[sae].items() if name not in ("id", "path", "neuronpedia")}
    card["settings"] = about.get("config_overrides") or {}
    return _download_folder(str(about["repo_id"]), None, str(known[sae]["path"])), card


@cache
def _catalogue() -> Mapping[str, Any]:
    """Return SAELens' list of releases, if sae-lens is installed. It is read as data; nothing of SAELens runs."""
    package = importlib.util.find_spec("sae_lens")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0], "pretrained_saes.yaml") if folders else None
    if path is None or not path.is_file():
        return {}
    import yaml  # type: ignore[import-untyped]

    found = yaml.load(path.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found if isinstance(found, dict) else {}


@cache
def _download_folder(repository: str, revision: str | None, inside: str) -> Path:
    """Download the files of one folder, or one file, and return where it lies. Asked once a process."""
    from huggingface_hub import HfApi, snapshot_download

    failures: tuple[type[Exception], ...] = (*hub_errors(), OSError, ValueError, RuntimeError)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        chosen = [name for name in files if name.endswith(_WEIGHT_ENDINGS) and _lies_in(name, inside)]
    except failures as error:
        chosen = [f"{inside}*"]
        folder = _in_cache(repository, revision, inside, error)
    else:
        if not chosen:
            raise UserError(_nothing_there(repository, inside, files))
        try:
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=chosen))
        except failures as error:
            raise UserError(_why_no_repository(repository, error)) from error
    return folder / inside


def _in_cache(repository: str, revision: str | None, inside: str, error: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:  # whatever it is, the hub's own refusal says more
        raise UserError(_why_no_repository(repository, error)) from error
    if not (folder / inside).exists():
        raise UserError(_why_no_repository(repository, error)) from error
    return folder


def _lies_in(name: str, inside: str) -> bool:
    folder, settings = name.rpartition("/")[0], f"{inside.removesuffix('.pt')}_cfg.json"  # those of a single file
    return name in (inside, settings) or folder in (inside, f"{inside}/checkpoints".strip("/"))


def _nothing_there(repository: str, inside: str, files: list[str]) -> str:
    folders = sorted({name.rpartition("/")[0] or name for name in files if name.endswith(_WEIGHT_ENDINGS)})
    near = nearest(inside, folders, n=5) if inside else folders[:5]
    return (
        f"sae.source: {repository} on the hub has no SAE in {inside or 'its top folder'}.\n"
        f"It has {len(folders):,} folders or files with weights; nearest: {', '.join(near or folders[:5]) or 'none'}."
    )


def _why_no_repository(repository: str, error: Exception) -> str:
    return (
        f"sae.source: {repository} is neither a local folder nor can it be read on the hub ({first_line(error)}).\n"
        "Name a folder, or OWNER/REPOSITORY/FOLDER. Set HF_TOKEN for a private or gated one; HF_HUB_OFFLINE=1 forbids "
        "the hub. Names of SAELens' catalogue (RELEASE/SAE) need the package sae-lens."
    )
