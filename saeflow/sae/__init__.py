"""Sparse autoencoders: architectures, the encoder product, the training step, formats, metrics. Read `autoencoder`
first.

autoencoder    parameters, loss and exact encoding
architectures  what each architecture does to a pre-activation
encoder        from activations to the few values that are not zero
kernels        Numba kernels for the few active entries
sparse_inputs  the encoder product of activations that are mostly zero
sparse_step    a training step that touches only active entries
dense_step     a training step for dense batches
formats        what the folder of an SAE says about it
interchange    SAEs read from and written to folders of other libraries
metrics        L0, variance unexplained and other figures
recovery       how many known features an SAE found
"""
