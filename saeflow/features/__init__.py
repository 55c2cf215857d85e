"""Feature values in Parquet: writing them, counting them, merging their parts. Read `schema` first.

schema         the tables of a run, column by column
coverage       which activation parts a feature part was computed from
token_columns  vocabulary entry, source and position of each token
counting       kernels that count values by feature and key
coactivation   which features fire together
statistics     the statistics of a part
files          how values lie in files
part_encoder   one activation part through one or more SAEs
part_writer    write one part
part_merger    write several parts as one
compaction     merge many parts into few
directions     similar features, and the words a feature promotes
run_tables     tables beside the parts of a run
"""
