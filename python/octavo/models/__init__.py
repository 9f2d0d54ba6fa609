"""Model families, one a file; their configs, and how they are found and loaded."""
