"""Experiments: a recipe that sweeps, and a module that turns its runs into numbers and pictures."""
