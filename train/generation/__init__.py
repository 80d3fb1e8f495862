"""Text made by a trained model: choosing tokens, making many texts at once, and the model of a checkpoint that does it."""
