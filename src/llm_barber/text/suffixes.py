"""Suffixes of the files that calibration and evaluation read.

Imports no torch, so that settings can check names.
"""

TOKEN_FILE_SUFFIX = ".safetensors"  # windows of tokens, `input_ids`, which are taken as they are
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", TOKEN_FILE_SUFFIX)
