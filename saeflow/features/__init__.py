"""Feature values in Parquet: writing them, counting them, merging their parts. Read `schema` first.

schema         the tables of a run, column by column
coverage       which activation parts a feature part was computed from
token_columns  what is known of a token beside its activation
counting       kernels that count values by feature and token
statistics     the statistics of a part
files          how values lie in files
part_writer    write one part
compaction     merge many parts into few
directions     similar features, and the words a feature promotes
run_tables     tables beside the parts of a run
"""
