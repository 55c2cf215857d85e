"""The recipe: settings, reading them from TOML, and what follows from them. Read `recipe` first.

recipe         the whole recipe as one validated model, and reading it from TOML
data_settings  its sections from documents to activations: every setting, its default and its meaning
settings       its sections from the feed to the evaluation
synthetic      the section [activations.synthetic]
sweep          the section [sweep]: which SAEs are trained together
schedule       the section [schedule]: when `saeflow serve` does what
cluster        the section [cluster]: Dask workers that share the work
section        the base class of a section, kinds of values, and what is wrong with one
template       the commented recipe that `saeflow init` writes
fingerprint    eight hex digits that stand for settings
"""
