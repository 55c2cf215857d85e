"""Parts made by the workers of a Dask cluster. Read `workers` first.

workers  join a cluster and give it parts
start    start a cluster, or find one
work     what runs on a worker
"""
