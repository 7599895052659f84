"""Forecasts of a run: `plan` rehearses it on a few layers with random weights, and extends what it measures."""
