"""The run, read top to bottom: recipe -> layout -> data -> model -> engine -> restore -> steps -> evaluation -> checkpoint.

Everything that merely watches (console, metrics file, W&B, report) is an observer beside the loop, see `train.observe`.
"""
