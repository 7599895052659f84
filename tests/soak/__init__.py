"""Random kills, damaged files and changed folders, for minutes: `make soak`."""
