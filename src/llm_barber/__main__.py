"""`llm-barber` and `python -m llm_barber`: a quiet way out even while the libraries are being imported."""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from llm_barber.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: interrupted\nhint: start again when you like", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
