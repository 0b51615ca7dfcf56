"""YAML that a person wrote: a key given twice, or one that is no text, is a mistake with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from firesteel.sdk.errors import ConfigError


def read(file: Path) -> Any:
    """The content of a YAML file. Raises ConfigError, naming file and line, where it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: {error.strerror}; give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8: {error}") from error
    return parse(text, str(file))


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError that begins with `where`."""
    # Imported here: importing the client library must not read YAML's tables.
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML lets a later key replace an earlier one without a word; here that is a mistake."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue  # `<<`: what the mapping itself says wins over what is merged in
                if key.tag != "tag:yaml.org,2002:str":
                    shown = key.value if isinstance(key, yaml.ScalarNode) else "this"
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{shown} is no text; put a key in quotes", key.start_mark
                    )
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML as expected: {error}") from error
