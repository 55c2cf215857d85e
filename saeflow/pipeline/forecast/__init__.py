"""What a recipe will take, from a survey of its corpus and a trial on a sample. Read `estimate` first.

estimate   the forecast of a whole recipe
survey     a corpus by its lengths, and a sample of it
trial      the recipe on the sample, in a store of its own
trial_run  the stages of a recipe on a sample, in a process of its own
"""
