"""Routes of pooling models: embeddings, scores, classes."""
