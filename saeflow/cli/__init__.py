"""The `saeflow` command. Read `app` first.

app     the command and its families
common  options, tables and errors that commands share
render  answers as tables, CSV, JSON and Parquet
doctor  what this machine has
run     commands that work: a recipe or one stage of it
synth   train on made activations
store   list, show, check, forget, clear
ask     questions and SQL
label   labels and the catalog
serve   keep pipelines going with Prefect
"""
