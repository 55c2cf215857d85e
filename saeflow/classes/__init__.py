"""Classes of tokens and documents, and how well each feature tells one from the rest. Read `annotations` first.

annotations  give classes to tokens of a run: from a table to the published artefact; what compaction takes out again
tables       a file or a select as a table of classes and places
places       the tokens that rows of that table name, and the rows that name none
characters   characters of documents become tokens
listing      list the annotations of a run, and remove them

membership   which classes each token belongs to, looked up in constant time
values       the values of a run, read feature by feature
ranking      kernels that rank values and count classes along the ranks
scores       every feature against every class: AUROC, F1 and others, with p and q by documents
best         keep the values of the best features so far, while all are scored
intervals    bootstrap intervals by document
probing      the artefact of these figures
samples      sampled tokens of classes, and what features, neurons and random directions give there
sparse_probes  logistic regressions on k features, k neurons, or k random directions
"""
