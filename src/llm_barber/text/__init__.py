"""Calibration text and its windows of tokens."""
