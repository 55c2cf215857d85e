"""What some questions need that no file of the run has: tokens that a select chooses, cosines, an estimate first.

supply         fetch what a question needs, whichever it is
selection      the tokens that a user's select chooses
directions     the decoder rows of a run's SAE, and cosines with those of another run
approximation  the question that estimates another one from a sample of documents
"""
