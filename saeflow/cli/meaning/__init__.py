"""Commands that say what features mean.

annotate          classes given to tokens and documents: `saeflow annotate`
probe             each feature against each class: `saeflow probe`
explain           explanations by rules: `saeflow explain`
explain_by_model  explanations by a language model: `saeflow explain --endpoint`
effects           what changes when a feature is changed: `saeflow effects`, `saeflow steer`
compare           features of one run found again in another: `saeflow compare`
"""
