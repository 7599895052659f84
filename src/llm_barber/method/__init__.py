"""The method of arXiv 2408.10631, and what goes beyond it, one decoder layer at a time."""
