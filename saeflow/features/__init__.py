"""Feature values in Parquet: writing them, counting them, merging their parts. Read `schema` first.

schema        the tables of a run, and which activation parts a feature part holds
counting      kernels that count values by feature and key
coactivation  which features fire together
statistics    the tokens of a part, and statistics of its values
sample        the values of a sample of documents, stored apart
files         how values lie in files
part_encoder  one activation part through one or more SAEs
compaction    merge many parts into few
levels        when the parts of a growing run are merged
left_out      how many tokens a run leaves out, and why
run_tables    tables beside the parts: similar features, and the words a feature promotes
beside        annotations, probes and effects that belong to a run
changes       what a feature's value becomes
splice        change features inside a running model
"""
