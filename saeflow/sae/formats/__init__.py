"""Autoencoders as folders, of every program that publishes some. Read `description` first.

description          what a folder holds, and checks of its settings
source               which program wrote a folder; what `sae.source` in a recipe means
saelens              settings of SAELens and saeflow
dictionary_learning  settings of dictionary_learning
tensors              tensors out of files, and nothing but tensors
load                 from a folder to an autoencoder; differences are folded in
save                 an autoencoder as a folder of SAELens 6
"""
