"""One training step: from a batch and the weights to loss and gradients. Read `batch` first.

batch        a batch, how it is to be explained, and the result of a step
sparse_step  a step that touches only active entries
dense_step   a step for batches in which many entries are active
gradients    from active entries to reconstructions, their errors, and gradients of the weights
"""
