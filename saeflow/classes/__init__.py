"""Classes of tokens and documents, and how well each feature tells one from the rest."""
