"""Explanations of features tested on every firing, and what the model does when one is changed.

effects  what the model does when features are changed, and texts continued with features set
"""
