"""Messages whose parts are text and names of settings."""

import pickle

from llm_barber.errors import SettingsError
from llm_barber.messages import Message, SettingName, joined, message


def shouted(setting: SettingName) -> str:
    return setting.name.upper() + ("" if setting.value is None else f"={setting.value}")


def test_a_field_without_a_value_is_the_name_of_a_setting() -> None:
    text = message("{swaps} are of {refine:swaps}, not of {method!r}", method="wanda")
    assert text == "swaps are of refine swaps, not of 'wanda'"
    assert text.parts == (
        SettingName("swaps"), " are of ", SettingName("refine", "swaps"), ", not of ", "'wanda'",
    )  # fmt: skip
    assert text.rendered(shouted) == "SWAPS are of REFINE=swaps, not of 'wanda'"


def test_what_is_given_stays_as_it_is() -> None:
    text = message("{output} is {path} of {size:.2f} GiB", path="/a/target_mix/{guard}", size=1.234)
    assert text.rendered(shouted) == "OUTPUT is /a/target_mix/{guard} of 1.23 GiB"


def test_messages_keep_their_parts_inside_others() -> None:
    inner = message("{guard} is low")
    text = joined(
        "; ", [message("{setting}: {said}", setting=SettingName("blocks", inside=(0, "linears")), said=inner)] * 2
    )
    assert text == "blocks.0.linears: guard is low; blocks.0.linears: guard is low"
    assert text.rendered(shouted) == "BLOCKS: GUARD is low; BLOCKS: GUARD is low"
    assert joined("; ", []) == ""


def test_errors_carry_messages() -> None:
    error = SettingsError(message("{guard} is low"), message("give {samples}"))
    assert (str(error), error.hint) == ("guard is low", "give samples")
    assert isinstance(error.message, Message)
    assert pickle.loads(pickle.dumps(error.message)).parts == error.message.parts
