"""Routes of models that give vectors: embeddings, scores, classes."""
