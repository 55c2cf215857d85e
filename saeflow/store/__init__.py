"""A store on disk or in a bucket: artefacts, their parts and records, generations and leases. Read `store` first.

files     checksums, and writes that a power cut leaves undone or whole
storage   the bucket that a folder stands for
records   the JSON records and lists of parts, each with its checksum
lease     one writer at a time, on one machine or several
artefact  one artefact: its parts, generations and publication
store     a store: its artefacts by kind and name
verify    compare every byte with its checksum, repair, upgrade
garbage   remove what nobody reads any more
"""
