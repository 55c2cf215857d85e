"""A store on disk or in a bucket: artefacts, their parts and records, generations and leases. Read `artefact` first.

artefact    an artefact, and the ways in which one is begun and finished
identity    what an artefact is and where its files lie
parts       which parts are finished, and how a new one is made
publishing  what readers see, and the five guards of a publication
store       a store: its artefacts by kind and name
storage     a folder or a bucket, behind one interface
records     the JSON records and lists of parts, each with its checksum
files       checksums, and writes that a power cut leaves undone or whole
owner       who holds a lease: a process, told apart from every other
lease_slot  the place where a lease is kept
lease       one writer at a time, on one machine or several
verify      find what is missing or changed, and repair it
upgrade     bring the records of an earlier format up to date
garbage     remove what nobody reads any more
"""
