"""The run: the typed recipe, the loop, optimizer and schedule, checkpoints, evaluation, observers and export."""
