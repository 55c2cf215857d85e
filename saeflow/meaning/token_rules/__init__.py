"""Explanations without a language model: the best simple rule for where a feature fires. Read `explain` first.

explain      explain a run's features, and write the rules as labels
choose       the best rule of each feature, chosen on training documents and measured on held-out ones
families     families of simple rules: each gives every token a key
shapes       the shape of a vocabulary entry, and how it begins and ends
wording      rules in words
token_table  the tokens of a run as arrays, and which are held out
firings      where features fire, read for a range of features at a time
hashing      numbers for n-grams, words and pairs of keys
counting     kernels that count firings by key and find the best union of keys
testing      the kernel that tests rules on held-out tokens, and keeps some mistakes
stored       rules as labels: which still hold, and which must go
"""
