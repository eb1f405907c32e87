"""Using a trained model: load it, take queries, write answers."""
