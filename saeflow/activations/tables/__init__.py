"""Activations that a user brings as a table. Read `table` first.

table       a table from a file or folder, a few megabytes at a time
arrays      npy, npz, safetensors and Zarr
columns     CSV, Parquet and Arrow
row_labels  the names of the rows
"""
