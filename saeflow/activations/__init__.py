"""Activations in Zarr: writing them, reading them shuffled, and tables that take their place. Read `shards` first.

shards     how arrays are cut into shards and chunks, and read again
writer     write activations into shards as they come
packed     compressed shards
norms      lengths of activations by position, and the warning about huge ones
epoch      the plan of an epoch: which blocks and rows, in which order
feed       shuffled minibatches, read ahead
tables     tables of activations that a user brings
synthetic  made activations whose features are known
"""
