"""Explanations by a language model behind any OpenAI-compatible endpoint, and their scores. Read `command` first.

command     `saeflow explain --endpoint`: explain many features at a time, and go on after a kill
settings    settings of a user: endpoint, examples, methods, budget
examples    a feature's examples from the store: bands, near misses, random tokens
prompts     prompts from files that a user can edit, and the examples as text
answers     read an answer: an explanation, yes or no for each example, a strength for each token
endpoint    ask the endpoint: retries, waits, budget; the key stays here
cache       every answer is kept at once, so that nothing is asked twice
feature     explain one feature and score its explanation
scores      balanced accuracy, correlation, and their intervals
cost        tokens forecast before and counted after
results     labels, scores and mistakes in the store
forgetting  remove what was made of forgotten documents
"""
