"""The recipe: settings, reading them from TOML, and what follows from them. Read `recipe` first.

settings     the sections of a recipe: every setting, its default and its meaning
sweep        the section [sweep]: which SAEs are trained together
schedule     the section [schedule]: when `saeflow serve` does what
recipe       the whole recipe as one validated model
load         a recipe read from a TOML file
template     the commented recipe that `saeflow init` writes
fingerprint  eight hex digits that stand for settings
"""
