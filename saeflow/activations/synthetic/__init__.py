"""Made activations whose features are known, to judge an SAE by. Read `ground_truth` first.

ground_truth   what is known about made activations
toy_models     the toys of the founding articles
superposition  many known features in few neurons, any number of rows
generate       made activations of any kind, as rows to store or as a table
"""
