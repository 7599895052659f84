"""Plumbing: modules and hooks. No files, no ranking."""
