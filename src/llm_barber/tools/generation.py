"""Results of `generate`: each model's text, its speeds and its memory."""

from pydantic import BaseModel, ConfigDict


class Speed(BaseModel):
    """Seconds that a number of tokens took, in each round of timing."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    seconds: tuple[float, ...]

    @property
    def per_second(self) -> float:
        """Tokens per second of the fastest round."""
        return self.tokens / min(self.seconds)


class GeneratedText(BaseModel):
    """A text that one model wrote, with the time and memory that it took.

    `tokens`: ids of `text`, with the token that ended it. `ended`: the model ended its text itself. `prefill`: the
    prompt until the first new token. `decode`: new tokens after the first; None: there were none. `weight_bytes`: of
    parameters and buffers in memory. `peak_memory`: bytes of the process, or on CUDA of the device's allocations, at
    the peak while the model wrote, less those before it was loaded; None where the system does not say. `linears` and
    `packed_linears`: of the model, and of these those that are packed in memory.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    text: str
    tokens: tuple[int, ...]
    ended: bool
    prefill: Speed
    decode: Speed | None
    weight_bytes: int
    peak_memory: int | None
    linears: int
    packed_linears: int


class Generation(BaseModel):
    """The text of a model and, if there is one, of the model that it is timed against.

    `chat`: the prompt was put into the chat template. `prompt_tokens`: with the template's. `interrupted`: Ctrl-C ended
    the generation; texts and speeds are of what was done. `against` is None, too, if it was interrupted before the
    other model wrote. `machine`: what computed.
    """

    model_config = ConfigDict(frozen=True)

    generated: GeneratedText
    against: GeneratedText | None
    chat: bool
    prompt_tokens: int
    interrupted: bool
    device: str
    dtype: str
    machine: str
    versions: dict[str, str]

    @property
    def prefill_ratio(self) -> float | None:
        """Speed of prefill over the other model's; None: there is no other model."""
        return _ratio(self.generated.prefill, self.against.prefill) if self.against else None

    @property
    def decode_ratio(self) -> float | None:
        """Speed of decoding over the other model's; None: there is no other model, or a text of one token."""
        return _ratio(self.generated.decode, self.against.decode) if self.against else None


def _ratio(speed: Speed | None, against: Speed | None) -> float | None:
    return None if speed is None or against is None else speed.per_second / against.per_second
