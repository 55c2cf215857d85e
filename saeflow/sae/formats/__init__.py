"""Autoencoders as folders, of every program that publishes some. Read `description` first.

description          what a folder holds and how it is read; checks of settings
source               which program wrote a folder; what `sae.source` in a recipe means
names                names of the files of SAELens' folders
hub                  names of the Hugging Face hub and of SAELens' catalogue
saelens              SAELens 3 to 6, and saeflow
dictionary_learning  dictionary_learning
sparsify             sparsify (EleutherAI)
gemma_scope          Gemma Scope 1 and 2
llama_scope          Llama Scope and others of OpenMOSS
single_files         single files: Qwen-Scope, circuit-tracer and others
tensors              tensors, or names and shapes, out of files, and nothing but tensors
load                 from a description to an autoencoder; differences are folded in
readings             other ways to read the weights of an imported SAE that explains little
save                 an autoencoder as a folder of SAELens 6
"""
