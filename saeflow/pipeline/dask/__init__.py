"""Parts made by the workers of a Dask cluster. Read `clusters` first.

clusters  start a cluster, or find one, require that it fits, and join it once a command
workers   give parts to the workers, and hear how far they are
gang      ranks of one training, each on a worker of its own, all at once
work      all that runs on a worker
"""
