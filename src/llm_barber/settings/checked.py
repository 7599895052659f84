"""Check settings, each by itself and then together; one error names every problem."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, Never, ParamSpec, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo

from llm_barber.checkpoint.untrusted import is_utf8
from llm_barber.errors import SettingsError
from llm_barber.messages import Message, SettingName, joined, marked, message
from llm_barber.settings.wording import wording

P = ParamSpec("P")
T = TypeVar("T")
Rule = Callable[[], Iterable[Message]]  # yields a problem for each combination that does not work


class WrongValueError(Exception):
    """A rule depends on a value that is wrong by itself."""


class WrongValue:
    """Stand-in for a wrong value: it is not None, and any use of it raises `WrongValueError`."""

    def _refuse(self, *_: Any) -> Never:
        raise WrongValueError

    def __getattr__(self, name: str) -> Never:
        raise WrongValueError

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __str__ = __format__ = __fspath__ = _refuse


WRONG = WrongValue()


class Settings(BaseModel):
    """A frozen set of settings; wrong ones raise one `SettingsError` that names them all."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        texts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ValueError("is empty: leave it out, or give it a value (is a variable of the shell not set?)")
        if not all(is_utf8(text) for text in texts if isinstance(text, str | Path)):
            raise ValueError("is not valid UTF-8: check the encoding of the shell, or rename the file or folder")
        return value

    @field_validator("model", "dense", "pruned", "against", "calibration", mode="before", check_fields=False)
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    def __init__(self, **values: Any) -> None:
        problems: list[Message] = []
        wrong: list[str] = []
        checked = self
        try:
            super().__init__(**values)
        except ValidationError as error:
            details = _without_consequences(error.errors())
            problems = [_problem(detail, type(self).model_fields) for detail in details]
            wrong = list(dict.fromkeys(str(detail["loc"][0]) for detail in details))
            checked = self._without_wrong_values(values, set(wrong))
        for rule in checked.rules():
            with suppress(WrongValueError):  # the rule cannot be checked before that value is right
                for problem in rule():
                    problems.append(problem)
        if problems:
            raise SettingsError(joined("; ", problems), self._hint(wrong))

    @classmethod
    def _hint(cls, wrong: Collection[str]) -> str:
        """Describe the wrong settings, or give a general hint where only a combination is wrong."""
        descriptions = [described(name, cls.model_fields[name]) for name in wrong if name in cls.model_fields]
        return joined("; ", descriptions) if descriptions else "see --help for what each setting takes"

    @classmethod
    def _without_wrong_values(cls, values: Mapping[str, Any], wrong: set[int | str]) -> Self:
        """The settings with `WRONG` for each wrong or missing value, so that the others' rules can be checked."""
        fields: dict[str, Any] = {
            name: (Any, Field(default_factory=lambda: WRONG)) for name in cls.model_fields if name in wrong
        }
        kind = create_model(cls.__name__, __base__=cls, **fields)
        checked = kind.__new__(kind)
        BaseModel.__init__(checked, **{name: value for name, value in values.items() if name not in wrong})
        return checked

    def rules(self) -> list[Rule]:
        """Rules about several settings; a rule is checked if the values that it uses are right by themselves."""
        return []


def takes(kind: type[Settings]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a public function whose first argument is its settings: anything else raises a `SettingsError`.

    Args:
        kind: class of the settings.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            config = args[0] if args else kwargs.get("config")
            if not isinstance(config, kind):
                given = "" if config is None else f", not {type(config).__name__}"
                names = [name for name, field in kind.model_fields.items() if field.is_required()]
                required = ", ".join(f"{name}=…" for name in sorted(names, key=lambda name: name == "output"))
                raise SettingsError(
                    f"{function.__name__} takes settings of type {kind.__name__}{given}",
                    f"call {function.__name__}({kind.__name__}({required}))",
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def described(name: str, field: FieldInfo) -> Message:
    """Name of a setting with its description."""
    return Message(SettingName(name), ": ", marked(field.description or ""))


def _without_consequences(details: list[Any]) -> list[Any]:
    """Pydantic's problems, without lists that are too short only because items of them are wrong."""
    wrong_items = {detail["loc"][0] for detail in details if len(detail["loc"]) > 1}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"][0] not in wrong_items]


def _problem(detail: Any, settings: Collection[str]) -> Message:
    """Pydantic's problem with a value, as a message that names the setting; `settings` are the names that there are."""
    name, *inside = detail["loc"]
    setting = SettingName(str(name), inside=tuple(inside))
    return message("{setting}: {words}", setting=setting, words=wording(detail, settings))
