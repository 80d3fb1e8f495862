"""The recipe: one tree of frozen dataclasses, composed by Hydra, read and validated as a whole before anything is allocated."""
