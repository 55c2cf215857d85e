"""Made activations whose features are known, to judge an SAE by. Read `truth` first.

truth          what is known of made activations
toys           the toys of the founding articles
superposition  many known features in few neurons, any number of rows
"""
