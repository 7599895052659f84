"""Helpers that tests of several rooms share: runs, processes, tokenizers, copies and example results."""
