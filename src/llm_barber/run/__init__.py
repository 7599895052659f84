"""A run: decoder layers streamed from disk to disk around the method."""
