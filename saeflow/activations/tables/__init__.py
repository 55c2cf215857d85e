"""Activations that a user brings as a table. Read `source` first.

source      a user's table: opened, checked, and told apart by a checksum
stream      a table as a stream of blocks of rows, and names of rows without labels
arrays      npy, npz, safetensors and Zarr
columns     Parquet and Arrow
csv_tables  CSV
"""
