"""Differences between models' accuracies on tasks, paired by example, and which of them are more than chance."""

import math
from collections.abc import Collection, Mapping, Sequence
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


def tasks_without_answers(evaluation: Evaluation) -> set[str]:
    """Tasks with an accuracy that has no right or wrong answer to each example.

    Their accuracy is a probability, or they are of a version that did not keep answers.
    """
    return {task.task for task in evaluation.tasks if task.metric == ACCURACY and task.right is None}


def answers(evaluations: Sequence[Evaluation], left_out: Collection[str] = ()) -> Answers | None:
    """A row's answers, from its evaluations (one a calibration seed).

    Args:
        evaluations: of the row.
        left_out: tasks that do not count: those without answers of the dense model.

    Returns:
        None: no evaluation has tasks, or they are of a version that did not keep the answer to each example.
    """
    by_task: dict[str, list[str | None]] = {}
    for evaluation in evaluations:
        for task in evaluation.tasks:
            if task.metric == ACCURACY and task.task not in left_out:
                by_task.setdefault(task.task, []).append(task.right)
    found = {name: [right for right in seeds if right] for name, seeds in by_task.items()}
    if not found or any(len(found[name]) < len(by_task[name]) for name in found):
        return None
    return {name: [fmean(map(int, digits)) for digits in zip(*seeds, strict=True)] for name, seeds in found.items()}


def paired_differences(rows: Mapping[str, Answers]) -> dict[tuple[str, str], Difference]:
    """The difference of each row from each earlier one, by (row, earlier row).

    Each task counts the same, whatever its number of examples. The standard error of the mean over T tasks is
    √(Σ s²) / T, with the standard errors s of each task's mean of differences.
    """
    differences = {}
    for (earlier, earlier_answers), (name, row_answers) in combinations(rows.items(), 2):
        by_task = [
            mean_and_standard_error([a - b for a, b in zip(row_answers[task], earlier_answers[task], strict=True)])
            for task in earlier_answers
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
