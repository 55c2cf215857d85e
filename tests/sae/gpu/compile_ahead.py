"""Compile the kernels of a module for a GPU that need not be there; print what each takes of it, as JSON lines.

python -m tests.sae.gpu.compile_ahead MODULE CAPABILITY
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saeflow.sae.gpu.specimens import Specimen


def resources(specimen: Specimen, capability: int) -> dict[str, Any]:
    """Return registers and bytes of stack of a thread, and bytes of shared memory. A stack means that registers spill.

    Addresses are multiples of 16, as torch's are, and so are sizes, unless the specimen says otherwise.
    """
    names = specimen.kernel.arg_names
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = [n for n, name in enumerate(names) if signature[name] != "constexpr" and name not in specimen.odd]
    source = ASTSource(
        fn=specimen.kernel, signature=signature, constexprs=specimen.constexprs,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    options = {"num_warps": specimen.warps, "num_stages": specimen.stages}
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    return {
        "name": specimen.name, "capability": capability, "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]), "shared": compiled.metadata.shared,
    }  # fmt: skip


def _usage(cubin: bytes) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))


if __name__ == "__main__":
    for specimen in importlib.import_module(f"saeflow.sae.gpu.{sys.argv[1]}").SPECIMENS:
        if int(sys.argv[2]) in specimen.capabilities:
            print(json.dumps(resources(specimen, int(sys.argv[2]))), flush=True)
