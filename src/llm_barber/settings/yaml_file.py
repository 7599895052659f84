"""Read a YAML file whose scalars stay text and whose keys are distinct."""

from collections import Counter
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml

from llm_barber.checkpoint.untrusted import check_regular
from llm_barber.errors import SettingsError


class _DistinctKeys(yaml.BaseLoader):
    """All scalars as they are written: others read 2:4 as a number of base 60; a key that is there twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, count in Counter(keys).items():
            if count > 1:
                raise yaml.YAMLError(f"{key} is there twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: str | Path) -> Any:
    """A YAML file's content; all scalars are text.

    Raises:
        ValueError: it is no regular file, cannot be read, or has a key twice.
    """
    try:
        check_regular(Path(expanduser(path)), SettingsError)
        return yaml.load(Path(expanduser(path)).read_text(encoding="utf-8"), Loader=_DistinctKeys)
    except SettingsError as error:
        raise ValueError(str(error)) from error
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from error
