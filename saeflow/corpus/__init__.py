"""Documents read from files, SQL and hubs, and turned into sequences of tokens. Read `sources` first.

document     one document: text, key, and what follows from the key
remote       files on hubs and in buckets
tabular      documents in tables: CSV, JSON, Parquet, SQL
sources      the documents of a corpus, streamed in a fixed order
ledger       which documents a store already holds
selection    which tokens count
vocabulary   the tokenizer's vocabulary as a table
token_parts  texts become sequences of vocabulary ids, written and read
"""
