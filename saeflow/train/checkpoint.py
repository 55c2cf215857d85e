"""Folders of checkpoints: written whole or not at all, and proven before anything is taken from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.runtime.errors import first_line
from saeflow.sae.formats.save import write_tensors
from saeflow.store.files import checksum, flush, make_folder, rename
from saeflow.store.links import is_file, remove, unlinked
from saeflow.store.records import Damaged, damaged, is_refusal, read_checked, write_checked

CHECKPOINT, STATE = "state.json", "state.safetensors"
"""The files of a checkpoint. The first is written last."""
_NONSENSE = (Damaged, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What a checkpoint that is not whole raises."""


def is_checkpoint(folder: Path) -> bool:
    """True if the folder holds a complete checkpoint."""
    return all(is_file(folder / name) for name in (CHECKPOINT, STATE))


def write(
    folder: Path, work: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], require: Callable[[], None]
) -> None:
    """Write a checkpoint under `work`, then put it in the place of the last one, unless `require` raises.

    `about` has the `step`, and all else that is no tensor.
    """
    whole, fresh = folder.with_name(folder.name + ".new"), work / f"{folder.name}.fresh"
    remove(fresh)
    make_folder(fresh)
    write_tensors(fresh / STATE, dict(tensors), {"step": str(about["step"])})
    flush(fresh / STATE)  # before the other file, which says that the checkpoint is complete
    proof = {"format_version": FORMAT_VERSION, "checksum": checksum(fresh / STATE)}
    write_checked(fresh / CHECKPOINT, dict(about) | proof)
    require()
    remove(whole)
    rename(fresh, whole)
    remove(folder)
    rename(whole, folder)


def try_newest(folder: Path, load: Callable[[Path], None]) -> bool:
    """Load the newest whole checkpoint, which then lies in `folder`; return False if there is none.

    Raises Damaged if none of those that are there is whole. Raises UserError if the system refuses to read one.
    """
    fresh, errors = folder.with_name(folder.name + ".new"), []
    for place in filter(is_checkpoint, (folder, fresh)):
        try:
            load(place)
        except _NONSENSE as error:
            if is_refusal(error):
                raise damaged(place, error) from error
            errors.append(f"The checkpoint {place} is damaged ({first_line(error)})")
            continue
        if place == fresh:
            remove(folder)
            rename(fresh, folder)  # the next `write` begins by removing `.new`
        return True
    if errors:
        raise Damaged("\n".join(errors))
    return False


def read_whole(
    folder: Path, read_state: Callable[[Path], dict[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write` got, from a checkpoint whose files belong together. Raises ValueError if they do not."""
    about = read_checked(folder / CHECKPOINT)
    tensors = read_state(unlinked(folder / STATE))
    with safe_open(folder / STATE, "pt") as file:
        step = (file.metadata() or {}).get("step", str(about["step"]))
    if step != str(about["step"]):
        raise ValueError(f"{STATE} is of step {step}, {CHECKPOINT} of step {about['step']}")
    if "checksum" in about and about["checksum"] != checksum(folder / STATE):  # an earlier saeflow did not write it
        raise ValueError(f"the checksum of {STATE} is wrong")
    return about, tensors


def moments_of(adam: torch.optim.Adam) -> dict[str, Tensor]:
    """Return the optimizer's state by its names in a checkpoint."""
    states = adam.state_dict()["state"].items()
    return {f"adam.{number}.{slot}": value for number, state in states for slot, value in state.items()}


def set_moments(adam: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state that a checkpoint has."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, slot = name.split(".", 2)
            state.setdefault(int(number), {})[slot] = value
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})
