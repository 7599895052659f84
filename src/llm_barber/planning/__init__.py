"""Forecasts of a run's costs, from a model's configuration alone: no weights are read."""
