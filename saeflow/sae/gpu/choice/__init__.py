"""The entries that a step keeps, found in the tiles of the encoder product.

chooser     what a training keeps from batch to batch to choose by: guesses, or the room for entries
choose      the largest of each row or of the batch, or all above a cut
guess       numbers that the next batch's entries will exceed
product     the encoder product in tiles, searched where it is made
search      the exact search for rows whose guess was wrong
"""
