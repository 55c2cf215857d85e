"""How good SAEs are: figures, pictures, and SAEs compared. Read `evaluate` first.

evaluate  the figures of an SAE
report    the picture of an SAE with few features
sweep     the table and picture of a sweep
"""
