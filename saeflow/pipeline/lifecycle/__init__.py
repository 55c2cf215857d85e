"""What happens to a store over time: documents come and go, and SAEs follow. Read `ingest` first.

ingest  new documents through every stage, and a new SAE once the store has grown
forget  documents leave the store
tidy    forgotten documents leave the disk, and small parts become larger ones
"""
