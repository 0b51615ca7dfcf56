"""Who may import whom, and what the source may not contain: read from the source itself, not from a convention."""

from __future__ import annotations

import ast
import builtins
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import firesteel
from firesteel.sdk import errors

SOURCE = Path(firesteel.__file__).parents[1]
OURS = ("firesteel", "training")
HEAVY = {"torch", "transformers", "peft"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (the deepest module that the statement names)."""

    module: str
    target: str
    when: str
    """`start` (when the module is imported), `call` (inside a function) or `types` (for the type checker)."""
    place: str


def _modules() -> dict[str, Path]:
    found = {}
    for top in OURS:
        for file in (SOURCE / top).rglob("*.py"):
            parts = file.relative_to(SOURCE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = _modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def _nodes(tree: ast.AST, when: str = "start") -> Iterator[tuple[ast.AST, str]]:
    """All nodes, with the time at which each runs."""
    for child in ast.iter_child_nodes(tree):
        inside = when
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = "call"
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            inside = "types"
        yield child, inside
        yield from _nodes(child, inside)


def _imports(module: str) -> Iterator[Import]:
    for node, when in _nodes(TREES[module]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else str(node.module) for name in inside]
        else:
            continue
        yield from (
            Import(module, target, when, f"{MODULES[module].name}:{node.lineno}") for target in targets
        )


IMPORTS = [found for module in MODULES for found in _imports(module)]
INTERNAL = [found for found in IMPORTS if found.target.split(".")[0] in OURS]


def _within(module: str, *rooms: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


# Each room, and the rooms it may use beside itself. `=name` is that module alone, not what lies under it.
ROOMS: dict[str, tuple[str, ...]] = {
    "firesteel.sdk": ("firesteel.sealed",),
    "firesteel.yaml_file": ("firesteel.sdk.errors",),
    "firesteel.catalog": ("firesteel.yaml_file", "firesteel.sdk.errors", "firesteel.sdk.shapes"),
    "firesteel.fetching": (),
    "firesteel.sealed": ("firesteel.sdk.errors",),
    "firesteel.model_sources": (
        "firesteel.catalog",
        "firesteel.fetching",
        "firesteel.sdk.errors",
        "firesteel.engine.tiny_llama",
    ),
    "firesteel.store": (
        "firesteel.catalog",
        "firesteel.fetching",
        "firesteel.model_sources",
        "firesteel.sealed",
        "firesteel.sdk.errors",
        "firesteel.sdk.shapes",
    ),
    "firesteel.machine": (),
    "firesteel.finding": (),
    "firesteel.installation": ("firesteel.finding",),
    "firesteel.model_size": ("firesteel.sealed", "firesteel.sdk.errors"),
    "firesteel.removal": (
        "firesteel.catalog",
        "firesteel.sealed",
        "firesteel.store",
        "firesteel.sdk.errors",
    ),
    "firesteel.engine": (
        "firesteel.machine",
        "firesteel.model_size",
        "firesteel.sdk",
        "firesteel.catalog",
        "firesteel.store",
        "firesteel.fetching",
        "firesteel.sealed",
    ),
    "firesteel.connection": ("firesteel.sdk", "firesteel.engine"),
    "firesteel.service": (
        "=firesteel",
        "firesteel.sdk",
        "firesteel.engine",
        "firesteel.catalog",
        "firesteel.store",
        "firesteel.sealed",
    ),
    "firesteel.cli": ("firesteel", "training"),
    "firesteel": ("firesteel.connection",),
    "training.utils": (
        "=firesteel",
        "firesteel.finding",
        "firesteel.machine",
        "firesteel.model_size",
        "firesteel.removal",
        "firesteel.connection",
        "firesteel.sdk",
        "firesteel.catalog",
        "firesteel.store",
        "firesteel.fetching",
        "firesteel.sealed",
    ),
    "training.recipes": ("training.utils", "firesteel.sdk", "firesteel.store"),
    "training": (),
}
# The two places that reach into a room they may not use in general; both only when called.
LAZY_REACHES = {("firesteel.connection", "firesteel.engine"), ("firesteel.model_sources", "firesteel.engine")}


def _room(module: str) -> str:
    return max((room for room in ROOMS if _within(module, room)), key=len)


def _may_use(module: str, target: str) -> bool:
    room = _room(module)
    if _within(target, room) and (room not in OURS or target == room):
        return True
    return any(target == used[1:] if used[0] == "=" else _within(target, used) for used in ROOMS[room])


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["wandb"], *extras["trackio"], *extras["server"]]
    declared = {re.split(r"[<>=~!\[ ]", need)[0].replace("-", "_").lower() for need in wanted}
    imported = {i.target.split(".")[0] for i in IMPORTS} - set(sys.stdlib_module_names) - set(OURS)
    assert {{"yaml": "pyyaml"}.get(name, name) for name in imported} <= declared


def test_every_file_has_a_room() -> None:
    assert {"firesteel.sdk.types", "firesteel.engine.engine", "training.utils.service"} <= set(MODULES)
    assert len(INTERNAL) > 50
    strays = [module for module in MODULES if _room(module) in OURS and module not in OURS]
    assert strays == []


def test_no_room_uses_another_that_it_may_not_use() -> None:
    wrong = [f"{i.module} ({i.place}) → {i.target}" for i in INTERNAL if not _may_use(i.module, i.target)]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("firesteel.sdk.types", "firesteel.sdk.errors", True),
        ("firesteel.sdk.types", "firesteel.engine.engine", False),
        ("firesteel.sdk.types", "firesteel.catalog", False),
        ("firesteel.sdk.types", "firesteel", False),
        ("firesteel.engine.engine", "training.utils.losses", False),
        ("firesteel.engine.engine", "firesteel.connection", False),
        ("firesteel.store", "firesteel.engine.models", False),
        ("training.utils.service", "firesteel", True),
        ("training.utils.service", "firesteel.engine.engine", False),
        ("training.utils.service", "firesteel.cli.main", False),
        ("training.utils.service", "training.recipes.dpo_loop", False),
        ("training.recipes.dpo_loop", "training.utils.losses", True),
        ("training.recipes.dpo_loop", "firesteel.engine.engine", False),
        ("training.recipes.dpo_loop", "firesteel.catalog", False),
    ],
)
def test_the_rule_itself_tells_right_from_wrong(module: str, target: str, allowed: bool) -> None:
    assert _may_use(module, target) == allowed


def test_only_the_composition_root_and_the_tiny_model_reach_the_engine_from_outside_and_lazily() -> None:
    inside = ("firesteel.engine", "firesteel.service", "firesteel.cli")
    reaching = {
        (i.module, "firesteel.engine"): i.when
        for i in INTERNAL
        if _within(i.target, "firesteel.engine") and not _within(i.module, *inside)
    }
    assert set(reaching) == LAZY_REACHES
    assert set(reaching.values()) == {"call"}


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        i for i in INTERNAL if _within(i.target, "firesteel.cli") and not _within(i.module, "firesteel.cli")
    ]
    assert wrong == []


def test_a_recipe_imports_no_other_recipe() -> None:
    recipes = [i for i in INTERNAL if _within(i.module, "training.recipes")]
    assert recipes
    assert [i for i in recipes if _within(i.target, "training.recipes")] == []


def test_the_client_side_and_the_two_small_rooms_import_no_model_library_at_the_start() -> None:
    wrong = [
        f"{i.module} ({i.place}) → {i.target}"
        for i in IMPORTS
        if i.when == "start" and i.target.split(".")[0] in HEAVY and not _within(i.module, "firesteel.engine")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        "firesteel.sdk",
        "firesteel",
        "firesteel.catalog",
        "firesteel.store",
        "training.utils",
        "training.recipes.dpo_loop",
        "training.recipes.orpo_loop",
        "training.recipes.sft_loop",
    ],
)
def test_importing_the_client_side_loads_no_model_library(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.strip() == ""


def test_the_engine_starts_when_it_is_asked_for_and_not_before() -> None:
    code = (
        "import sys, firesteel; assert 'firesteel.engine.engine' not in sys.modules\n"
        "try: firesteel.connect('http://there')\nexcept firesteel.sdk.NotBuiltYetError: pass\n"
        "print('torch' in sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout.strip()) == (0, "False"), outcome.stderr


# What the source may not contain


def _calls(name: str) -> list[str]:
    """Places of calls whose function reads like `name` (its last parts)."""
    return [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(f".{name}")
    ]


def test_nothing_asks_an_object_whether_it_has_an_attribute() -> None:
    assert _calls("hasattr") == []


def test_nothing_is_ever_unpickled() -> None:
    for name in (
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "joblib.load",
        "dill.loads",
        "torch.load",
    ):
        assert _calls(name) == []
    unpicklers = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    assert [i for i in IMPORTS if i.target.split(".")[0] in unpicklers] == []


def _caught(handler: ast.ExceptHandler) -> list[str]:
    """Names of the classes that a handler catches; none is everything."""
    if handler.type is None:
        return ["BaseException"]
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(kind) for kind in kinds]


HANDLERS = [
    (module, node)
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ExceptHandler)
]


def test_all_errors_are_only_caught_at_a_border() -> None:
    # The border of the engine, those of service and command line, the try-out of unknown architectures, and trackers.
    borders = (
        *("firesteel.engine.engine", "firesteel.service", "firesteel.cli", "firesteel.engine.models"),
        *("training.utils.sinks", "training.utils.trackers"),
    )
    everywhere = [(module, node.lineno) for module, node in HANDLERS if "Exception" in _caught(node)]
    assert [(module, line) for module, line in everywhere if not _within(module, *borders)] == []
    single = ("firesteel.engine.engine", "firesteel.engine.models")
    for module in (*single, "training.utils.sinks", "training.utils.trackers"):
        assert sum(place == module for place, _ in everywhere) <= 1


def test_whoever_catches_even_interrupts_raises_them_again() -> None:
    silent = [
        module
        for module, node in HANDLERS
        if "BaseException" in _caught(node) and not isinstance(node.body[-1], ast.Raise)
    ]
    # The engine's border runs in a thread that no interrupt reaches; what it catches is its operation's result.
    assert silent == ["firesteel.engine.engine"]


# Errors

MADE_OF = {
    errors.RowError: ("rows.jsonl", 3, "chosen", "is wrong"),
    errors.TrainerRewound: (3, "what is wrong"),
}
ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_way_to_another_process(kind: type[errors.FiresteelError]) -> None:
    error = kind(*MADE_OF.get(kind, ("what is wrong",)))
    error.add_note("a note")
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is kind
    assert str(there) == str(error)
    assert "wrong" in str(there)
    assert there.__dict__ == error.__dict__
    assert (there.code, there.category) == (error.code, error.category)


def test_every_error_has_a_code_of_its_own_and_a_standard_kind() -> None:
    assert len(ERRORS) >= 10
    assert len({kind.code for kind in ERRORS}) == len(ERRORS)
    for kind in ERRORS:
        assert issubclass(kind, errors.FiresteelError)
        assert kind.category == ("user" if issubclass(kind, errors.UserError) else "server")
        if kind not in (errors.FiresteelError, errors.UserError):
            standard = [base for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base]
            assert standard[0] is not Exception, kind


def test_every_error_can_be_had_from_the_sdk() -> None:
    from firesteel import sdk

    assert {kind.__name__ for kind in ERRORS} <= set(sdk.__all__)
    assert all(getattr(sdk, name) is not None for name in sdk.__all__)
