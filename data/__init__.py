"""Text to tokens to batches; the batch of a step is a pure function of the recipe and the step."""
