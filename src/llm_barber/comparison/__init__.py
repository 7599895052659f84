"""Side by side: methods, with and without rebuild, at several sparsities, on the same work."""
