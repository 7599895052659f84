"""The record of a run, `barber.json`: what it says, how it is read and verified."""
