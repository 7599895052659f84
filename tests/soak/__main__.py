"""`python -m tests.soak --minutes 20 --seed 35`: trials until the time is over, or until one breaks a promise."""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from tests.soak.trials import TRIALS, Soak, free

TOLD_EVERY = 10  # seconds


def main() -> int:
    """Run trials; returns 1 if one broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (default: 2)")
    parser.add_argument("--seed", type=int, default=None, help="of all trials (default: a new one, which is printed)")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to repeat one")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    torch.set_num_threads(1)
    began = told = time.monotonic()
    print(f"soak: seed {seed}, {options.minutes:g} minutes", flush=True)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        number = options.first
        while (spent := time.monotonic() - began) < options.minutes * 60:
            trial, work = TRIALS[number % len(TRIALS)], Path(folder) / f"trial-{number}"
            work.mkdir()
            try:
                trial(soak, work, random.Random(f"{seed}-{number}"))
            except Exception:
                traceback.print_exc()
                print(f"soak: trial {number} ({trial.__name__}) failed; again: --seed {seed} --first {number}")
                return 1
            free(work)
            counts[trial.__name__] += 1
            number += 1
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                print(f"soak: {number - options.first} trials, {options.minutes * 60 - spent:.0f} s left", flush=True)
    print(f"soak: clean; {', '.join(f'{name} {count}' for name, count in counts.items())}")
    print(f"{counts.total()} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
