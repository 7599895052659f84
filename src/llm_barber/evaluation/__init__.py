"""How good a model is: perplexity, and distance from another model's predictions."""
