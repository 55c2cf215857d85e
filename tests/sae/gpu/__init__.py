"""Tests of kernels for a GPU: on one if there is one, else in Triton's interpreter."""

import os

import torch

PLACE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # or Triton 3.9 warns that the default will change
if PLACE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
