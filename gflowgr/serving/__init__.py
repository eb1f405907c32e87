"""Serving of a trained model: load it, read queries, write answers."""
