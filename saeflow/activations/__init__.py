"""Activations in Zarr: writing them, reading them shuffled, and tables that take their place. Read `shards` first.

shards         how arrays are cut into shards and chunks, and read again
writer         write activations into shards as they come, compressed or not
forward        token parts through the model, a batch at a time
collector      what the model gives for one part, written to disk
norms          lengths of activations by position, and the warning about huge ones
lengths        which vectors are too long to count
epoch          the plan of an epoch: which blocks and rows, in which order
feed           shuffled batches, read ahead, and how well they are mixed
upload         batches on their way to a GPU
sparse_values  non-zero values by row
engines        activations that an inference engine has written
tables         tables of activations that a user brings
synthetic      made activations whose features are known
"""
