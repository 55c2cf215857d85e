"""Explanations of features tested on every firing, and what the model does when one is changed.

matching  which features of one run are found again in another
"""
