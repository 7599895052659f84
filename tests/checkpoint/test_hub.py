"""Files of hub ids that are not there: which problem is told, without a network."""

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from llm_barber.checkpoint.hub import hub_file
from llm_barber.errors import HubError, ModelError


def test_a_file_comes_from_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    assert hub_file("org/name@v1", "config.json") == tmp_path / "config.json"
    assert asked == {"name": "org/name", "revision": "v1", "allow_patterns": ["config.json"]}
    with pytest.raises(HubError, match="org/name has no packed.json on the hub, or the hub cannot be reached"):
        hub_file("org/name", "packed.json")


def test_a_hub_that_cannot_be_reached_and_a_name_that_is_none() -> None:
    with pytest.raises(HubError, match="nosuch is not a folder here, and the hub cannot be reached"):
        hub_file("nosuch", "config.json")  # tests set HF_HUB_OFFLINE
    with pytest.raises(ModelError, match="no such model: a b"):
        hub_file("a b", "config.json")


@pytest.mark.parametrize(
    ("error", "told", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be downloaded: .*No space left", "HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be downloaded: .*denied", "HF_HOME"),
        (HfHubHTTPError.__bases__[0]("the server ended the connection"), "the hub cannot be reached", "connection"),
    ],
)
def test_a_download_that_fails_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str, hint: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=told) as caught:
        hub_file("org/name", "config.json")
    assert hint in caught.value.hint
