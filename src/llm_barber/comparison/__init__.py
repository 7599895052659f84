"""Comparison of methods, without and with rebuild, at several sparsities, on the same texts and tasks."""
