"""Write the pages that are made of something else: `python docs/generate.py`, from the project's root.

`index.md` is the README with the links of the site, `configuration.md` what the schemas of the recipes say of
themselves. `tests/test_documents.py` compares both with what is committed.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from training import recipes
from training.utils.config import Settings

ROOT = Path(__file__).parent.parent
MODULES = [
    importlib.import_module(f"training.recipes.{found.name}")
    for found in pkgutil.iter_modules(recipes.__path__)
]
RECIPES: list[type[Settings]] = [module.Config for module in MODULES]

FRONT = """\
# Configuration

A run is described by one object, the `Config` of its recipe. A YAML file, `--set name=value` and flags
(`--learning-rate`) fill it, the later winning; from Python it is built directly. Names that it does not have, values
out of range and settings that contradict each other are refused before anything is loaded, and so is a setting that the
chosen loss does not read.
A nested setting is written with a dot: `--trainer.training-shape-id`, or `trainer: {training_shape_id: …}` in YAML.

This page is made from the schemas by `docs/generate.py`. `firesteel dpo --help` says the same.
"""


def index() -> str:
    """The README. Links into `docs/` become those of the site; files that are not of the site keep their name only."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^]]+)\]\(([^)#:]+)(#[^)]*)?\)", _of_the_site, readme)


def _of_the_site(link: re.Match[str]) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    inside = target.removeprefix("docs/")
    return f"[{text.replace('docs/', '')}]({inside}{anchor})" if inside != target else text


def configuration() -> str:
    """Every setting of every recipe: first what all of them have, then each one's own, then nested settings."""
    shared = [name for name in RECIPES[0].model_fields if all(name in r.model_fields for r in RECIPES)]
    shared = [name for name in shared if len({_row(recipe, name) for recipe in RECIPES}) == 1]
    parts = [FRONT, "## Every recipe\n", _table(RECIPES[0], shared)]
    for recipe in RECIPES:
        verb = _module(recipe).removesuffix("_loop")
        own = [name for name in recipe.model_fields if name not in shared]
        parts += [f"## `firesteel {verb}`\n", f"`training.recipes.{_module(recipe)}.Config`, beside these:\n"]
        parts += [_table(recipe, own)]
    for nested in dict.fromkeys(inner for recipe in RECIPES for inner in _nested(recipe)):
        parts += [
            f"## {nested.__name__}\n",
            f"{_sentence(nested.__doc__)}\n",
            _table(nested, list(nested.model_fields)),
        ]
    return "\n".join(parts)


def _module(recipe: type[Settings]) -> str:
    return recipe.__module__.rpartition(".")[2]


def _nested(settings: type[Settings]) -> Iterator[type[Settings]]:
    for field in settings.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield field.annotation
            yield from _nested(field.annotation)


def _table(settings: type[Settings], names: list[str]) -> str:
    rows = "".join(_row(settings, name) for name in names)
    return f"| setting | type | default | |\n|---|---|---|---|\n{rows}"


def _row(settings: type[Settings], name: str) -> str:
    field = settings.model_fields[name]
    cells = (f"`{name}`", _type(field), _default(field), _sentence(field.description))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _type(field: FieldInfo) -> str:
    """As people write it, with the bounds that the schema has."""
    bounds = [_bound(rule) for rule in field.metadata]
    return ", ".join([_name(field.annotation), *filter(None, bounds)])


def _bound(rule: object) -> str:
    match rule:
        case annotated_types.Gt(gt=limit):
            return f"> {_number(limit)}"
        case annotated_types.Ge(ge=limit):
            return f"≥ {_number(limit)}"
        case annotated_types.Lt(lt=limit):
            return f"< {_number(limit)}"
        case annotated_types.Le(le=limit):
            return f"≤ {_number(limit)}"
        case _:
            return ""


def _number(value: object) -> str:
    return "2⁶³" if value == 2**63 else str(value)


def _name(annotation: object) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_name(typing.get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", bool: "yes or no", int: "whole number", float: "number"}
    return names.get(typing.cast("type", annotation), str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return "unset"
    if field.default in ("", ()) or isinstance(field.default, Settings):
        return ""
    value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{value}`"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


PAGES = {"index.md": index, "configuration.md": configuration}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (Path(__file__).parent / name).write_text(write(), encoding="utf-8")
