"""The files that answers come from. Read `relations` first.

relations    lists of files as SQL
chosen       the few files that one question reads
token_index  what stands at a token, looked up without SQL
quoting      values, names and paths as SQL text
"""
