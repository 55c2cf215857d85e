"""Triton kernels for a sparse training step on a GPU. Only who trains there imports them. Read `fused` first.

fused       a whole step of the top-k family
choice      the entries a step keeps
decode      reconstructions, residuals and derivatives of the active entries, by row
auxiliary   what dead features add to it
exchange    what several ranks tell one another in a step
memory      bytes that a training takes, by formula; it alone does not import Triton
rows        gradients of the rows of both matrices, and Adam's step
specimens   what is needed to compile a kernel without a GPU
"""
