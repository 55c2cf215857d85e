"""From nothing to answers with a published SAE: the three commands of the page, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.support.command import Command
from tests.support.published_saes import tensors_to, write_json
from tests.support.small_pipeline import documents, write_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "published-sae.md"
WIDTH = 16


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Texts, a model, and an SAE of its residual stream in the layout of Gemma Scope 2."""
    (tmp_path / "texts").mkdir()
    for number, row in enumerate(documents()[-20:]):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(row["text"], "utf-8")
    write_model(tmp_path / "models" / "lm", n_positions=256)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))).Q
    both = torch.cat([rotation, -rotation], dim=1)
    tensors = {"w_enc": both, "w_dec": both.t(), "b_enc": torch.zeros(2 * WIDTH), "b_dec": torch.zeros(WIDTH)}
    tensors_to(tmp_path / "saes/gemma/params.safetensors", tensors | {"threshold": torch.full((2 * WIDTH,), 0.05)})
    about = {"architecture": "jump_relu", "hf_hook_point_in": "transformer.h.0.output", "l0": 14, "width": 2 * WIDTH}
    write_json(tmp_path / "saes/gemma/config.json", about)
    return tmp_path


def test_three_commands_lead_from_nothing_to_answers(place: Path, saeflow: Command) -> None:
    block = re.search(r"```sh\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    commands = [shlex.split(line) for line in block[1].splitlines()]
    assert [words[:2] for words in commands] == [["saeflow", name] for name in ("init", "run", "ask")]
    for words in commands:
        said = saeflow(*words[1:])
        assert said.code == 0, f"{shlex.join(words)}: {said.err}"
    assert "feature" in said.out
    assert len(said.out.splitlines()) > 5
    store = place / "data" / "store"
    assert not list(store.glob("activations/**/*.zarr")), "no activation is stored"
    assert list(store.glob("features/*/manifest.json"))
