"""`firesteel dpo|orpo|sft …`: a recipe's `Config` as a command. File, `--set` and flags are one schema, the Config.

A later source wins over an earlier one: default < file < `--set` < flag.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from firesteel import yaml_file
from firesteel.sdk.errors import ConfigError
from training.recipes import dpo_loop, orpo_loop, sft_loop
from training.utils.config import Settings
from training.utils.training_settings import TrainingSettings

CONFIGS: Mapping[str, type[TrainingSettings]] = {
    config.recipe: config for config in (dpo_loop.Config, orpo_loop.Config, sft_loop.Config)
}
"""The settings of every recipe, by its verb."""
_DATA = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")


def register(app: typer.Typer) -> None:
    """Add every recipe to the command line."""
    app.command("dpo", help="Direct Preference Optimization from chosen/rejected pairs.")(
        _command(dpo_loop.Config, dpo_loop.main)
    )
    app.command("orpo", help="Odds Ratio Preference Optimization: the same pairs, without a reference.")(
        _command(orpo_loop.Config, orpo_loop.main)
    )
    app.command("sft", help="Supervised fine-tuning on conversations or completions.")(
        _command(sft_loop.Config, sft_loop.main)
    )


def _command(config: type[TrainingSettings], main: Callable[[Any], object]) -> Callable[..., None]:
    """A function whose signature, which typer reads, has one option per field of `config`."""
    paths = dict(_fields(config))

    def command(
        config_file: Path | None,
        set_: list[str],
        fresh: bool = False,
        resume_from: str | None = None,
        **flags: str | bool | None,
    ) -> None:
        values = read_settings(config_file, set_)
        for name, given in flags.items():
            if given is not None:
                value = given if isinstance(given, bool) else _value(given)
                _assign(values, paths[name].split("."), value)
        if sum((fresh, resume_from is not None, flags.get("resume") is not None)) > 1:
            raise ConfigError("--fresh, --resume-from and --resume are one setting; give one of them")
        if fresh or resume_from is not None:
            values["resume"] = "never" if fresh else resume_from
        main(settings_of(config.recipe, values, "`firesteel {recipe}`"))

    file = typer.Argument(None, metavar="[CONFIG.yaml]", help="Settings as YAML.", show_default=False)
    assignments = typer.Option([], "--set", metavar="KEY=VALUE", help="One setting; nested ones as a.b=c.")
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("config_file", kind, default=file, annotation=Path | None),
        inspect.Parameter("set_", kind, default=assignments, annotation=list[str]),
    ]
    if "resume" in config.model_fields:
        anew = typer.Option(
            False, "--fresh", help="Start anew: the same as --resume never.", show_default=False
        )
        there = typer.Option(
            None, "--resume-from", metavar="step-N", help="The same as --resume step-N.", show_default=False
        )
        parameters.append(inspect.Parameter("fresh", kind, default=anew, annotation=bool))
        parameters.append(inspect.Parameter("resume_from", kind, default=there, annotation=str | None))
    for name, path in paths.items():
        option, annotation = _option(config, path)
        parameters.append(inspect.Parameter(name, kind, default=option, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def read_settings(config_file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """The settings of a file, and over them those that were given as `key=value`."""
    values = read_config(config_file) if config_file else {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected key=value, for instance --set beta=0.2")
        _assign(values, path.strip().split("."), _value(text))
    return values


def settings_of(recipe: str, values: Mapping[str, Any], other: str) -> TrainingSettings:
    """These as a recipe's settings. Raises ConfigError, which says what asks for `other` recipes where they have one.

    `other` is how a user does that: `--recipe {recipe}`.
    """
    try:
        return CONFIGS[recipe](**values)
    except ConfigError as error:
        unknown = [name for name in values if name not in CONFIGS[recipe].model_fields]
        hints = ""
        for verb, config in CONFIGS.items():
            if foreign := [name for name in unknown if name in config.model_fields]:
                verb_is = "are settings" if len(foreign) > 1 else "is a setting"
                hints += f"\n{', '.join(foreign)} {verb_is} of {verb}: {other.format(recipe=verb)}"
        raise ConfigError(f"{error}{hints}") from None


def _fields(config: type[Settings], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting as (parameter name, dotted path), nested settings included."""
    for name, field in config.model_fields.items():
        path = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _fields(field.annotation, f"{path}.")
        else:
            yield path.replace(".", "__"), path


def _option(config: type[Settings], path: str) -> tuple[Any, Any]:
    """A setting's flag and the type of its value: a switch for yes or no, else text that the schema converts."""
    *groups, name = path.split(".")
    for group in groups:
        nested = config.model_fields[group].annotation
        assert isinstance(nested, type)
        config = nested
    field = config.model_fields[name]
    default = "required" if field.is_required() else f"default {field.default!r}"
    name = path.replace("_", "-")
    described = f"{field.description} [{default}]"
    if field.annotation is bool:
        return typer.Option(None, f"--{name}/--no-{name}", help=described, show_default=False), bool | None
    option = typer.Option(None, f"--{name}", metavar="VALUE", help=described, show_default=False)
    return option, str | None


def read_config(path: Path) -> dict[str, Any]:
    """Settings by name, as a YAML file gives them."""
    if path.name.removesuffix(".gz").endswith(_DATA):
        raise ConfigError(_looks_like_data(path))
    try:
        content = yaml_file.read(path)
    except ConfigError:
        if _first_line_is_a_row(path):
            raise ConfigError(_looks_like_data(path)) from None
        raise
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings as `name: value`, found {type(content).__name__}")
    return content


def _first_line_is_a_row(path: Path) -> bool:
    with suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        return isinstance(json.loads(file.readline()), dict)
    return False


def _looks_like_data(path: Path) -> str:
    return (
        f"{path}: looks like data, and settings are expected here (YAML, `name: value`). Data is named by the setting "
        f"dataset: `--dataset {path}` of firesteel {', '.join(CONFIGS)}, or `dataset: {path}` in the settings; "
        f"`firesteel data check {path}` looks at data by itself"
    )


def _value(text: str) -> Any:
    """Plain text as it stands (the schema converts numbers); lists, mappings and null by YAML."""
    if text[:1] in ("[", "{") or text in ("null", "~"):
        return yaml_file.parse(text, text)
    return text


def _assign(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if not isinstance(inner, Mapping | None):
            raise ConfigError(f"{'.'.join(path)}: {part} is given as {inner!r}; give its settings one by one")
        # A mapping of its own: what the file holds is not changed in place.
        values[part] = dict(inner or {})
        values = values[part]
    values[path[-1]] = value
