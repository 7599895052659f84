"""Examples of multiple-choice tasks, in the form of our task files."""

QUESTIONS = [
    {"query": "one", "choices": ["abc", "d"], "gold": 0},
    {"query": "two and more", "choices": ["ab", "ac", "x y z"], "gold": 2},
    {"query": "three", "choices": ["a", "b"], "gold": 1},
    {"query": "four!", "choices": ["q", "qq"], "gold": 0},
]
