"""Hugging Face: a checkpoint to a directory others can load, and back."""
