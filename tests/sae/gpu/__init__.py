"""Triton's kernels on the processor, by its interpreter. The variable is read when triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
