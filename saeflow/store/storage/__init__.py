"""Where the files of a store lie: a folder or a bucket, behind one interface. Read `folder` first.

folder        what every storage can do, and a folder
objects       requests to an object store, by key
local_copy    what a bucket holds, and which files of the folder that stands for it are the bucket's
bucket        an object store, with a folder of this machine that stands for it
duckdb_files  files of a bucket as DuckDB reads them
pieces        ranges of a bucket's files, read with few requests
piece_cache   footers and small tables, kept on this machine
work          work in progress: what lies in tmp/, and what a bucket keeps of it
traffic       requests and bytes, counted
"""
