"""Sparse autoencoders: architectures, exact encoding, the training step, formats, metrics. Read `autoencoder` first.

autoencoder    the autoencoder: training loss, exact encoding, reconstruction
parameters     weights, biases, thresholds, and how they start
architectures  traits, value, penalty and derivatives of each architecture
loss           the training loss of a batch, with all gradients
encoder        the encoder product, and a bound on its error
exact          every value, exactly as it is stored, by token or by feature; the entries of a training step
batch          a batch, how it is to be explained, and the result of a step
split          how several processes share a step
step           one training step, sparse or dense
gradients      from active entries to reconstructions, their errors, and gradients of the weights
pursuit        matching pursuit: encoding and training step
kernels        Numba kernels for the few active entries
optimizer      Adam's moments in 8 bits, weights in bfloat16
gpu            Triton kernels for a training step on a GPU
formats        folders of autoencoders, of any program: read, folded in, written
metrics        L0, variance unexplained and other figures
recovery       how many known features an SAE found
"""
