"""Triton kernels for training and encoding on a GPU. Only who works there imports them. Read `fused` first.

fused       a whole step
figures     what a step takes besides its batch, and the figures that it leaves on the device
choice      the entries a step keeps
explain     how well they reconstruct the batch, and what they add to the gradients
decode      reconstructions, residuals and derivatives of the active entries, by row
auxiliary   what dead features add to a step
exchange    what ranks that split the rows of a batch tell one another in a step
feature_exchange  what ranks that split the features tell one another
guard       whether steps change anything
encode      exact values, as the processor gives them
memory      bytes that a training takes, by formula; it needs no Triton
rows        gradients of the rows of both matrices, and Adam's step
vectors     Adam's step of biases and of an architecture's own parameters
specimens   what is needed to compile a kernel without a GPU
"""
