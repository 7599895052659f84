"""Results of an evaluation: perplexity and accuracies, each with everything it depends on."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """A result: it does not change."""

    model_config = ConfigDict(frozen=True)


class TextComparison(Frozen):
    """The comparison of two models' predictions on a text.

    `perplexity`: the other model's. `perplexity_ratio`: the evaluated model's perplexity over it. Means over tokens:
    `divergence`, the Kullback-Leibler divergence of the evaluated model's next-token distribution from the other's,
    nats; `top_agreement`, the share of tokens with the same most likely next token.
    """

    perplexity: float
    perplexity_ratio: float
    divergence: float
    top_agreement: float


class TextResult(Frozen):
    """Perplexity on one text, with everything that the number depends on.

    `begins_with_bos`: each window begins with BOS, or with other tokens that the tokenizer puts in front of texts.
    """

    text: str
    perplexity: float
    windows: int
    seqlen: int
    begins_with_bos: bool
    sha256: str
    against: TextComparison | None


class TaskComparison(Frozen):
    """The other model's value, and the difference of the evaluated model's value from it.

    `standard_error` is that of the difference: paired by example, or of independent samples where `right` is None.
    """

    value: float
    difference: float
    standard_error: float


class TaskResult(Frozen):
    """One metric of one task: an accuracy from 0 to 1, its standard error, and its examples.

    `right`: a digit for each example in the task's order, 1 where the model is right and 0 elsewhere; None: the metric
    is no share of examples, or an earlier version did not keep it.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    examples: int
    shots: int
    source: str
    sha256: str | None
    against: TaskComparison | None
    right: str | None = Field(default=None, pattern="^[01]+$")

    @model_validator(mode="after")
    def _check_right(self) -> Self:
        if self.right is not None and len(self.right) != self.examples:
            raise ValueError(f"right has {len(self.right)} digits for {self.examples} examples")
        return self


class Evaluation(Frozen):
    """The evaluation of one model; `against` is the model that it was compared with, None: it was not."""

    model: str
    against: str | None
    device: str
    dtype: str
    versions: dict[str, str]
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...] = ()
