"""The stages of a pipeline, one file each, and the ways to run them. Read `stages` first.

lineage       the artefacts a recipe means in a store, and the facts behind their fingerprints
parts         what the parts of a stage are, and how this process makes them
tokens        documents to tokens
collect       tokens to activations
import_table  a table to activations
train         activations to SAEs, or an SAE trained elsewhere
encode        activations to feature values
compact       the parts of a run merged
evaluate      the figures of an SAE
report        the picture of an SAE with few features
sweep         the table and picture of a sweep
stages        all stages in order
foreign       an SAE trained elsewhere, checked when it comes in
lifecycle     documents come and go, and SAEs follow
forecast      what a recipe will take: a survey of the corpus, and figures from a trial
trial         the recipe on a sample, measured in a process of its own
dask          parts made by a Dask cluster
"""
