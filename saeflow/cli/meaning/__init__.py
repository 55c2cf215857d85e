"""Commands that say what features mean.

annotate  classes given to tokens and documents: `saeflow annotate`
probe     each feature against each class: `saeflow probe`
explain   explanations by rules or a language model: `saeflow explain`
compare   features of one run found again in another: `saeflow compare`
effects   what changes when a feature is changed: `saeflow effects`, `saeflow steer`
"""
