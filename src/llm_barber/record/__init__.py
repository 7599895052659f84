"""The record of a run, `barber.json`: its content, reading it, and verifying a folder against it."""
