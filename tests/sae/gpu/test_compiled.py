"""Every kernel compiles at its real sizes, without a GPU, and its threads have registers enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import saeflow.sae.gpu

FOLDER = Path(saeflow.sae.gpu.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.glob("**/*.py")
    if "\nSPECIMENS" in path.read_text("utf-8")
)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a block may have, by CUDA's table of compute capabilities."""


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", MODULES)
def test_no_kernel_spills_registers_or_asks_for_more_shared_memory_than_there_is(module, capability, tmp_path):
    command = [sys.executable, "-m", "tests.sae.gpu.compile_ahead", module, str(capability)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True, check=True
    )
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    assert not [kernel for kernel in kernels if kernel["stack"] or kernel["shared"] > SHARED_MEMORY[capability]]


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_of_a_module_has_a_specimen(module):
    text = (FOLDER / f"{module.replace('.', '/')}.py").read_text("utf-8")
    defined = {line.removeprefix("def ").split("(")[0] for line in text.splitlines() if line.startswith("def ")}
    kernels = {name for name in defined if name.endswith("_kernel")}
    specimens = __import__(f"saeflow.sae.gpu.{module}", fromlist=["SPECIMENS"]).SPECIMENS
    assert {specimen.kernel.__name__ for specimen in specimens} == kernels
