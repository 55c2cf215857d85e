"""Explanations of features tested on every firing, and what the model does when one is changed.

token_rules     explanations without a language model: the best simple rule for where a feature fires
effects         what the model does when features are changed, and texts continued with features set
language_model  explanations by a language model behind an OpenAI-compatible endpoint, and their scores
beside_labels   tables beside a source's file of labels: scores, mistakes, answers
feature_list    features as a person lists them
matching        which features of one run are found again in another
"""
