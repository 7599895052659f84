"""Differences between models' accuracies on tasks, paired by example, and which of them are more than chance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from llm_barber.evaluation.result import Evaluation
from llm_barber.evaluation.tasks import mean_and_standard_error

ACCURACY = "acc"
# Half the width of a 95 % interval, in standard errors.
INTERVAL = 1.96
# Probability of at least one pair more than chance, if no two models differ.
LEVEL = 0.05

# By task: the share of calibration seeds with which the model answers each example rightly.
Answers = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Difference:
    """Mean over tasks of one model's accuracy less another's, and its standard error; from -1 to 1."""

    mean: float
    standard_error: float

    @property
    def probability(self) -> float:
        """Probability of a mean as far from 0 or further, if the two models do not differ (normal, two-sided).

        1 where all examples of a task differ alike: a spread of 0 says nothing about other examples.
        """
        if self.standard_error == 0:
            return 1.0
        return math.erfc(abs(self.mean) / self.standard_error / math.sqrt(2))


def answers(evaluations: Sequence[Evaluation]) -> Answers:
    """A row's answers, from its evaluations (one a calibration seed).

    A task whose accuracy is a probability has no right or wrong answers, and is left out.
    """
    by_task: dict[str, list[str]] = {}
    for evaluation in evaluations:
        for task in evaluation.tasks:
            if task.metric == ACCURACY and task.right:
                by_task.setdefault(task.task, []).append(task.right)
    return {name: [fmean(map(int, digits)) for digits in zip(*seeds, strict=True)] for name, seeds in by_task.items()}


def paired_differences(rows: Mapping[str, Answers]) -> dict[tuple[str, str], Difference]:
    """The difference of each row from each earlier one, by (row, earlier row).

    Each task of the first row counts the same, whatever its number of examples; rows that lack one are left out. The
    standard error of the mean over T tasks is √(Σ s²) / T, with the standard errors s of each task's mean of
    differences.
    """
    tasks = list(next(iter(rows.values()), ()))
    complete = {name: row for name, row in rows.items() if tasks and row.keys() >= set(tasks)}
    differences = {}
    for (earlier, earlier_answers), (name, row_answers) in combinations(complete.items(), 2):
        by_task = [
            mean_and_standard_error([a - b for a, b in zip(row_answers[task], earlier_answers[task], strict=True)])
            for task in tasks
        ]
        differences[name, earlier] = Difference(
            fmean(mean for mean, _ in by_task), math.hypot(*(error for _, error in by_task)) / len(by_task)
        )
    return differences


def beyond_chance(differences: Mapping[tuple[str, str], Difference]) -> set[tuple[str, str]]:
    """The pairs whose difference is more than chance.

    Holm's procedure (1979): the k-th smallest of n probabilities is compared with LEVEL / (n − k + 1), from k = 1 up
    to the first that is larger.
    """
    chosen = set()
    ordered = sorted(differences, key=lambda pair: differences[pair].probability)
    for number, pair in enumerate(ordered):
        if differences[pair].probability > LEVEL / (len(ordered) - number):
            break
        chosen.add(pair)
    return chosen
