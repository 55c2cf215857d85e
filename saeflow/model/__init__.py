"""A language model: loading it, naming its sites, reading what passes through them. Read `sites` first.

load         load a model or tokenizer, and fingerprint its files
sites        name the modules of a model, read and replace their activations
hook_names   the sites that names of TransformerLens and others mean
direct_path  what reaches the logits without passing a later layer
"""
