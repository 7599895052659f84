"""Settings of every command, checked before anything runs."""
