"""An opened model with everything that pruning needs to know of it."""
