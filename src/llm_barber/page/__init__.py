"""Self-contained HTML pages of results: one file each, no network, no scripts, light and dark."""
