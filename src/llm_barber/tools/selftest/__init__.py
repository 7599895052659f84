"""`llm-barber selftest`: checks of a GPU, or of a CPU as far as they go there, and a report to paste into an issue."""
