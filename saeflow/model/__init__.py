"""A language model: loading it, naming its sites, reading what passes through them. Read `sites` first.

sites        load a model, name its modules, read their activations
direct_path  what reaches the logits without passing a later layer
"""
