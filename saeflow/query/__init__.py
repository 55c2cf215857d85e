"""Questions in SQL: DuckDB with the files of `sql/`. Read `ask` first.

ask            ask a question or run SQL
questions      the named questions and their arguments
new_text       the features of a new text, by running the model
outside        what else a question may need: tokens that a select chooses, cosines between two runs
runs           the runs of a store, and the files each is made of
run_records    a run's stages, settings and log of training
connection     DuckDB with that SQL loaded, nothing else to read, and the checks
generations    what was published when somebody began to read
kept_catalog   what DuckDB has made of that SQL before
files          the files that answers come from, as SQL, and which of them one question reads
labels         labels of features
label_import   labels from Neuronpedia, delphi and other tools
catalog        the SQL that makes the runs askable, here or as `catalog.sql`
first_answers  three questions to ask first
text_formats   answers as CSV and JSON
api            the Python API
"""
