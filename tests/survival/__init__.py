"""Kill anything at any moment; the run goes on with the same numbers.

The real command is started, killed at a moment that is aimed at or drawn, and started again, many times in the life of one run (`journey`). Its
metrics, the samples it read and its last checkpoint must then be those of a run that nobody disturbed. `python -m tests.survival` is the sweep.
"""
