"""Files of hub ids that are not there: which problem is told, without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

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
