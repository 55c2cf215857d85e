"""Random recipes, corpora, stores and requests: every command ends with exit code 0 or 2, one message, and in time;
no page fails.

python -m tests.fuzz --recipes 2000 --corpora 500 --stores 300 --pages 1000    all of it, by seed
python -m tests.fuzz --recipes 1 --first 41                       the case of seed 41 alone, with what it says

oracle   what a command may do, and a command run and judged
recipes  settings of every kind with values of every kind
corpora  files of every format, damaged, misnamed and in odd encodings; tables of activations; files of labels
stores   a finished store with bytes, records and files changed
pages    requests to the pages of a finished store
"""
