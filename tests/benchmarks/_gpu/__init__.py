"""The parts of `python -m tests.benchmarks.gpu`.

measure   sizes, clocks, and the rows that a part gives
work      runs parts, each for a limited time, in a process that may die
correct   each kernel against float64
parts     each part of a step, beside the card's limit
dense     the whole dense step, for torch.compile
steps     whole steps, and the memory that they take
around    the feed, the collection of activations, and encoding
tables    the rows as a table, as JSON and as bars
"""
