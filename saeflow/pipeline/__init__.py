"""The stages of a pipeline, one file each, and the ways to run them. Read `stages` first.

lineage       the artefacts a recipe means in a store
facts         what their fingerprints are made of
parts         what the parts of a stage are, and how this process makes them
tokens        documents to tokens
collect       tokens to activations
train         activations to SAEs, or an SAE trained elsewhere
encode        activations to feature values
compact       the parts of a run merged
judge         how good SAEs are
stages        all stages in order
foreign       tables of activations and SAEs that were made elsewhere
lifecycle     documents come and go, and SAEs follow
forecast      what a recipe will take: a survey of the corpus, and figures from a trial
trial         the recipe on a sample, measured in a process of its own
dask          parts made by a Dask cluster
"""
