"""Classes of tokens and documents, and how well each feature tells one from the rest. Read `annotations` first.

annotations  give classes to tokens of a run: from a table to the published artefact; what compaction takes out again
tables       a file or a select as a table of classes and places
places       where the rows of that table lie: documents, ranges of tokens, and what did not match
characters   characters of documents become tokens
listing      what annotations a run has, and removing them
"""
