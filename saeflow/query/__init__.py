"""Questions in SQL: DuckDB with the files of `sql/`. Read `ask` first.

relations      lists of files as DuckDB relations
labels         names given to features
label_import   labels from Neuronpedia, delphi and other tools
bucket_files   files of a bucket, fetched as DuckDB asks for them
runs           a connection with the runs of a store
checks         SQL that returns rows only where something is wrong
questions      the named questions and their arguments
ask            ask a question or run SQL
api            the Python API
catalog        `catalog.sql`: the runs for DuckDB alone
first_answers  three questions to ask first
"""
