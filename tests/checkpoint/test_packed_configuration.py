"""The entry in a packed folder's config.json comes out as it went in, whatever the file's layout."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_barber import PackConfig, pack, unpack
from llm_barber.checkpoint.packed_configuration import KEY, names_packed, packed_configuration, plain_configuration
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from tests.conftest import change_json, make_model

SHARDS = ["packed-model-00002-of-00002.safetensors", "packed-model-00001-of-00002.safetensors"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES), st.sampled_from([None, 0, 2, "\t"]), st.sampled_from(["", "\n", " \r\n\n"]))
def test_taking_the_entry_out_gives_the_same_bytes(content: dict[str, object], indent: object, end: str) -> None:
    plain = (json.dumps(content, indent=indent, ensure_ascii=False) + end).encode("utf-8", "surrogatepass")  # type: ignore[arg-type]
    packed = packed_configuration(plain, SHARDS)
    assert plain_configuration(packed) == plain
    assert packed_configuration(packed, SHARDS) == packed  # a second entry is not added
    assert json.loads(packed)[KEY]["weights"] == SHARDS[1]
    assert names_packed(json.loads(packed))
    assert not names_packed(content) or content[KEY] == {"quant_method": "llm-barber"}


@pytest.mark.parametrize(
    "plain",
    [
        b"{}",
        b"{ }\n",
        b'{"a":1}',
        b'{"a": 1 }\r\n',
        b'{\n  "quantization_config": null\n}\n',  # the last of two keys counts
        b'{"a": "}", "b": {"c": []}}',
        b'{"a": ",\\n  \\"quantization_config\\": {}"}',
    ],
)
def test_files_of_all_kinds(plain: bytes) -> None:
    packed = packed_configuration(plain, SHARDS)
    assert packed != plain
    assert names_packed(json.loads(packed))
    assert plain_configuration(packed) == plain_configuration(plain) == plain


@pytest.mark.parametrize("content", [b"", b"}", b"{", b"[]", b"\xff\xfe}", b'{"quantization_config": 3}'])
def test_other_content_stays_as_it_is(content: bytes) -> None:
    assert plain_configuration(content) == content


def test_an_entry_that_was_written_anew_is_taken_out_too() -> None:
    packed = json.loads(packed_configuration(b'{"a": 1}', SHARDS))
    anew = json.dumps({**packed, "b": 2}).encode()  # not the last any more
    assert json.loads(plain_configuration(anew)) == {"a": 1, "b": 2}
    other = json.dumps({"a": 1, KEY: {"quant_method": "gptq"}}).encode()
    assert plain_configuration(other) == other


def test_unpacking_gives_back_the_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dense", "llama")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(content), indent=5) + "  \n\n")
    before = (folder / "config.json").read_bytes()
    pack(PackConfig(model=str(folder), output=tmp_path / "packed"))
    assert KEY in json.loads((tmp_path / "packed" / "config.json").read_text())
    assert KEY not in CheckpointSource(tmp_path / "packed").configuration
    unpack(PackConfig(model=str(tmp_path / "packed"), output=tmp_path / "unpacked"))
    assert (tmp_path / "unpacked" / "config.json").read_bytes() == before


def test_a_dense_folder_that_calls_itself_packed_is_refused(llama: Path) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": "llm-barber"})
    with pytest.raises(ModelError, match=r"has no packed\.index\.json, though its config\.json"):
        CheckpointSource(llama)
