"""Documents read from files, SQL and hubs, and turned into sequences of tokens. Read `sources` first.

document       one document: text, key, and what follows from the key
remote         files on hubs and in buckets
files          which files a pattern means, their format, and their unpacked text
text_tables    rows of CSV and JSON files, each cell as it is written
metadata       types of the other columns of CSV and JSON files
sorting        rows sorted by their keys in bounded memory
parquet_types  types of the columns of Parquet files, joined exactly
tabular        documents in tables: Parquet and SQL by DuckDB, CSV and JSON row by row
requests       what an inference engine has written, as documents
sources        the documents of a corpus, streamed in a fixed order
forgotten      which documents the store must not take in again
ledger         which documents a store already holds
selection      which tokens count
vocabulary     the tokenizer's vocabulary as a table
tokenise       texts and conversations turned into vocabulary ids that know where they come from
token_parts    texts become sequences of vocabulary ids, written and read
"""
