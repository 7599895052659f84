"""`python -m llm_barber`."""

from llm_barber.cli import main

main()
