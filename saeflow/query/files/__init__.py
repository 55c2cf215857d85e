"""The files that answers come from. Read `relations` first.

relations    lists of files as SQL
by_table     the files of a run, by table
slices       the values at tokens all over the corpus
chosen       the few files that one question reads
looked_up    the SQL of connections that look tokens up without SQL
token_index  the vocabulary id and the document of a token
far_ids      vocabulary ids in a bucket
token_texts  the text around a token
vocabulary   entries of the vocabulary
letters      letters whose bytes several tokens share
cost         files, requests, bytes and seconds of an answer
quoting      values, names and paths as SQL text
"""
