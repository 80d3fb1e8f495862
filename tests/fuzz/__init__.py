"""Coverage-guided fuzzing of everything that reads what others may have written; run by hand, see `tests/fuzz/__main__.py`."""
