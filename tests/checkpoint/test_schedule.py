"""How often activations are written, on a clock of the test's own."""

import math

import pytest

from llm_barber.checkpoint.schedule import MOST_LAYERS, SHARE, Schedule


def layers_kept(layers: int, of_a_layer: float, of_a_file: float) -> list[int]:
    """Layers after which files begin, if nothing waits for a file; times in seconds."""
    time, ends, kept = 0.0, float("inf"), []
    schedule = Schedule(lambda: time)
    for finished in range(1, layers + 1):
        computed = finished * of_a_layer
        if ends <= computed:
            time, ends = ends, float("inf")
            schedule.end()
        time = computed
        if ends == float("inf") and schedule.begin_if_due(finished):
            kept.append(finished)
            ends = computed + of_a_file
    return kept


@pytest.mark.parametrize(
    ("of_a_file", "expected"),
    [
        (0.09, [1, 2, 3, 4, 5, 6, 7, 8]),
        (0.39, [1, 5, 9, 13, 17, 21, 25]),  # as in the example of `Schedule`
        (0.79, [1, 9, 17, 25]),
        (7.5, [1, 9, 17, 25]),  # more than a share of the time, but after no more than `MOST_LAYERS`
        (9.5, [1, 11, 21]),  # as soon as the file before is complete
        (100.0, [1]),
    ],
)
def test_layers_after_which_files_begin(of_a_file: float, expected: list[int]) -> None:
    assert layers_kept(8 if of_a_file < SHARE else 26, 1.0, of_a_file) == expected


def test_the_distance_is_the_shortest_that_the_rules_allow() -> None:
    for number in range(200):
        of_a_file = number / 10 + 0.05
        kept = layers_kept(400, 1.0, of_a_file)
        cheap = [layers for layers in range(1, 400) if of_a_file <= SHARE * layers or layers == MOST_LAYERS]
        expected = max(min(cheap), math.ceil(of_a_file))
        assert kept == list(range(1, 401, expected))
