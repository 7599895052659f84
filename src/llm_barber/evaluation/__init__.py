"""Evaluation of a model: perplexity, tasks, and the distance from another model's predictions."""
