"""Triton kernels for a sparse training step on a GPU. Only who trains there imports them. Read `fused` first.

fused       a whole step of the top-k family
auxiliary   what dead features add to it
choose      the entries a step keeps: the largest of each row or of the batch, or all above a cut
guess       numbers that the next batch's entries will exceed
product     the encoder product in tiles, searched where it is made
search      the exact search for rows whose guess was wrong
decode      reconstructions, residuals and derivatives of the active entries, by row
by_feature  entries sorted by feature, segments of long features, sums by feature
update      gradients of the rows of both matrices and Adam's step, in one kernel
adam        Adam's step of a row, and the rows that take one
moments     Adam's moments in float32 or 8 bits, and weights in bfloat16
specimens   what is needed to compile a kernel without a GPU
"""
