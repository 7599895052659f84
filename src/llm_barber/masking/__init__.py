"""Masks from tensors: scores in, keep mask out. No modules, no files."""
