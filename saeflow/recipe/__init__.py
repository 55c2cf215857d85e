"""The recipe: settings, reading them from TOML, and what follows from them. Read `recipe` first.

recipe             the whole recipe as one validated model
settings           its sections in the order of the pipeline: every setting, its default and its meaning
synthetic          the section [activations.synthetic]
sweep              the section [sweep]: which SAEs are trained together
schedule           the section [schedule]: when `saeflow serve` does what
cluster            the section [cluster]: Dask workers that share the work
section            the base class of a section, and kinds of values
load               a recipe read from a TOML file
validation_errors  what is wrong with a recipe, in words
template           the commented recipe that `saeflow init` writes
fingerprint        eight hex digits that stand for settings
"""
