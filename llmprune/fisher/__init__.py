"""How much the model's output depends on each value inside, by its Fisher information."""
