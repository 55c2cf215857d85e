"""From activations to the few values that are not zero. Read `encoder` first.

encoder         the encoder product, and a bound on its error
sparse_inputs   the encoder product of activations that are mostly zero
active_entries  entries chosen for a training step
exact           every value, exactly as it is stored
feature_major   the same values by feature, and their statistics
"""
