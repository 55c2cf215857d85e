"""Measure what a model does when features are changed. Read `measure` first.

measure    plan the work, do it part by part, publish
firings    which firings are changed, drawn from quantile bands
part       one part: its sequences, forward passes, and rows
branches   many changed copies of a sequence in one forward pass
figures    loss, KL divergence and the entries that moved most
tables     the tables on disk: their columns, and how parts become one
run_model  the model, tokenizer and SAE of a run
steer      continue a text with features set
"""
