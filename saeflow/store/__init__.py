"""A store on disk or in a bucket: artefacts, their parts and records, generations and leases. Read `artefact` first.

artefact    an artefact: begun, published, and the five guards of a publication
parts       where its files lie, which parts are finished, and how a new one is made
store       a store: its artefacts by kind and name
storage     a folder or a bucket, behind one interface
records     the JSON records and lists of parts, each with its checksum
lists       lists of parts, opened without reading the records of their files
looks       looks at the files of very many parts, for speed
links       no link leads out of a store: nothing follows one, reading or writing
files       checksums, and writes that a power cut leaves undone or whole
user_cache  where the user's cache lies, and whether somebody else may have written it
lease_slot  who holds a lease, and the place where it is kept
lease       one writer at a time, on one machine or several
verify      find what is missing or changed, and repair it
upgrade     bring the records of an earlier format up to date
garbage     remove what nobody reads any more
"""
