"""Triton kernels for a sparse training step on a GPU. Only who trains there imports them. Read `choose` first.

choose     the entries a step keeps: the largest of each row or of the batch, or all above a cut
guess      numbers that the next batch's entries will exceed
product    the encoder product in tiles, searched where it is made
search     the exact search for rows whose guess was wrong
specimens  what is needed to compile a kernel without a GPU
"""
