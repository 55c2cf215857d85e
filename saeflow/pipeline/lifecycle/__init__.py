"""What happens to a store over time: documents come and go, and SAEs follow. Read `ingest` first.

ingest     new documents through every stage
deletions  documents that are gone from the corpus
forget     documents leave the store
retrain    a new SAE once the store has grown
"""
