"""The stages of a pipeline, one file each, and the ways to run them. Read `run` first.

lineage       the artefacts a recipe means in a store, looked up once
identity      the facts behind each fingerprint
parts         what the parts of a stage are, and how this process makes them
tokens        documents to tokens
collect       tokens to activations
import_table  a table to activations
train         activations to SAEs
import_sae    an SAE trained elsewhere
encode        activations to feature values
compact       the parts of a run merged
evaluate      the figures of an SAE
report        the picture of an SAE with few features
sweep         the table and picture of a sweep
run           all stages in order
lifecycle     documents come and go, and SAEs follow
forecast      what a recipe will take
dask          parts made by a Dask cluster
"""
