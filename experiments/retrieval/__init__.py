"""What attention buys a Mamba-2 model that has to find what it has read; see docs/retrieval.md."""
