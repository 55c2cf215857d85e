"""Explanations of features tested on every firing, and what the model does when one is changed.

language_model  explanations by a language model behind an OpenAI-compatible endpoint, and their scores
"""
