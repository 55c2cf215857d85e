"""The `saeflow` command. Read `app` first.

app       the command and its families
common    options, tables and errors that commands share
run       commands that work: a recipe or one stage of it
summary   what a run prints at its end
synth     train on made activations, and score
store     list, show, check, forget, clear
answers   commands that answer: questions and SQL
browse    the pages of a store in a browser, a copy of them, and a report of a run
label     labels and the catalog
meaning   what features mean: annotations, probes, explanations, effects
serve     keep pipelines going with Prefect
doctor    what this machine has
"""
