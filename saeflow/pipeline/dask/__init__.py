"""Parts made by the workers of a Dask cluster. Read `clusters` first.

clusters  join a cluster, once a command, and have it make parts
start     start a cluster, or find one
fit       whether scheduler and workers have this saeflow and see the store
workers   give parts to the workers, and hear how far they are
work      what runs on a worker
"""
