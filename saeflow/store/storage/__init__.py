"""Where the files of a store lie: a folder or a bucket, behind one interface. Read `interface` first.

interface     what every storage can do, and the state that one opened storage keeps
folder        a folder, on a local disk or on one that several machines share
objects       requests to an object store, by key
listing       what a bucket holds, listed once
local_copy    the folder of this machine that stands for a bucket, and which of its files are the bucket's
bucket        an object store, with a folder of this machine that stands for it
duckdb_files  files of a bucket as DuckDB reads them
"""
