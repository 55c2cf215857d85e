"""Activations out of an inference engine's files instead of a model. Read `places` first.

places   which tensor of a file is which site of the model
layouts  what the files of an engine hold, by place
reader   the activations of a part of tokens, a request at a time
"""
