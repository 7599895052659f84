from llm_barber.page.lines import Line, perplexity_lines


def test_a_perplexity_far_beyond_dense_does_not_stretch_the_axis() -> None:
    near = Line("near", 0, False, {"0.5": 30.0, "0.7": 80.0, "2:4": 60.0})
    gone = Line("gone", 1, False, {"0.5": 900.0, "0.7": 8e6, "2:4": 5e3})
    drawn = [
        perplexity_lines("figure", lines, ["0.5", "0.7"], ["2:4"], 20.0, "label", "sparsity")
        for lines in ([near], [near, gone])
    ]
    assert "1000" in drawn[1]
    assert not any(power in drawn[1] for power in ("10⁴", "10⁵", "10⁶", "10⁷"))
    # A triangle for each of the two values that lie beyond, beside the circles.
    assert drawn[1].count("<use") - drawn[0].count("<use") > 3
