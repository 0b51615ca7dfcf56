"""The code blocks of the documents: found, and run in the order of their page.

A block says what it is by its language; what is not one of `LANGUAGES` is refused, so that no block escapes:

- ``python`` runs in one namespace per page. With ``title="name.py"`` it is a file, which something later must import
  or run.
- ``sh``: every `firesteel …` runs, and `python file.py`, in this process; `firesteel serve` in one of its own until the
  page ends, on a free port. Its address, its key and the id of a new key take the place of those that the page shows.
- ``yaml`` is read as a catalogue or as the settings of a recipe, ``json`` and ``jsonl`` as rows of data. With a
  ``title`` they are also files for what follows.
- ``text`` is what a program printed, a diagram or a formula.

`<!-- not run: reason -->` before a block leaves it out: the commands of it are then parsed, but not run.
`<!-- refused: words -->` says that the block ends in a user's error with these words.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from typer.core import TyperGroup

from firesteel.catalog import load_catalog
from firesteel.cli.main import app
from firesteel.sdk import UserError
from training.utils import preference_data
from training.utils.row_forms import claimed
from training.utils.sft_data import read_sft_row

ROOT = Path(__file__).parent.parent
LANGUAGES = ("python", "sh", "yaml", "json", "jsonl", "text")
ROWS = 20
"""Rows of `pairs.jsonl`, `eval.jsonl` and `chats.jsonl`, which stand for the reader's own data."""

_ADDRESS, _KEY, _KEY_ID = "http://127.0.0.1:8350", "fs-…", "key-0123456789ab"
_A_KEY_ID = re.compile(r"\bkey-[0-9a-f]{12}\b")
_OPEN = re.compile(r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?(?P<rest>.*)$')
_MARK = re.compile(r"^<!-- (?P<kind>not run|refused): (?P<words>.+) -->$")


@dataclass(frozen=True)
class Block:
    """One code block of a page."""

    place: str
    """`page:line` of its first line."""
    language: str
    title: str | None
    text: str
    marks: dict[str, str]


def pages() -> list[Path]:
    """Every document whose blocks are run; `docs/index.md` is the README once more."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
    return sorted(set(found) - {ROOT / "docs/index.md"})


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order. Raises ValueError for one whose language is not known."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, marks, at = [], {}, 0
    while at < len(lines):
        if mark := _MARK.match(lines[at]):
            marks[mark["kind"]] = mark["words"]
        elif opened := _OPEN.match(lines[at]):
            end = lines.index(f"{opened['indent']}```", at + 1)
            place = f"{page.relative_to(ROOT)}:{at + 2}"
            if opened["language"] not in LANGUAGES or opened["rest"]:
                raise ValueError(f"{place}: {lines[at]!r}; expected one of {', '.join(LANGUAGES)}")
            text = "".join(f"{line.removeprefix(opened['indent'])}\n" for line in lines[at + 1 : end])
            blocks.append(Block(place, opened["language"], opened["title"], text, marks))
            marks, at = {}, end
        elif lines[at].strip():
            marks = {}
        at += 1
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    """The command lines of a block, as words."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_folder(words) for words in split if words]


def _without_folder(words: list[str]) -> list[str]:
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def parse_command(arguments: Sequence[str]) -> None:
    """Raise where `firesteel` has no such verb, option or argument."""
    command, words = typer.main.get_command(app), list(arguments)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    command.make_context("firesteel", words)


@dataclass
class Ran:
    """A page that was run."""

    folder: Path
    names: dict[str, Any]
    printed: dict[str, str] = field(default_factory=dict)
    """By the place of a block."""
    real: dict[str, str] = field(default_factory=dict)
    """What stands for something on the page, as a key, and what it is in this run."""
    until_the_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Servers that were started."""
    files_run: set[str] = field(default_factory=set)

    def printed_after(self, words: str, blocks: Sequence[Block]) -> str:
        """What the one block with these words in it has printed."""
        (block,) = [block for block in blocks if words in block.text]
        return self.printed[block.place]


@contextlib.contextmanager
def a_readers_folder(folder: Path) -> Iterator[None]:
    """The working folder of somebody who follows a page: the examples, own data, a model that needs no fetching."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    for file in (folder / "examples").rglob("*.jsonl"):
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        file.write_text("".join(f"{json.dumps(with_short_answers(row))}\n" for row in rows), encoding="utf-8")
    own = {"pairs.jsonl": "preferences/train.jsonl", "chats.jsonl": "sft_then_dpo/chats.jsonl"}
    for name, example in {**own, "eval.jsonl": "preferences/heldout.jsonl"}.items():
        lines = (folder / "examples" / example).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:ROWS]), encoding="utf-8")
    write_file(folder / "stand-in.yaml", "models: {}\n")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_CATALOG", str(folder / "stand-in.yaml"))
        patch.setenv("FIRESTEEL_HOME", str(folder / "home"))
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]


def with_short_answers(value: Any) -> Any:
    """A row whose answers are cut: a byte is a token of the model that stands in, and long rows only take time."""
    if isinstance(value, list):
        return [with_short_answers(item) for item in value]
    if not isinstance(value, dict):
        return value
    cut = {"content": value["content"][:40]} if value.get("role") == "assistant" else {}
    return {key: with_short_answers(item) for key, item in value.items()} | cut


def write_file(path: Path, text: str) -> None:
    """A file that a page shows. In a catalogue a model that is made in code stands in for the real one."""
    if path.suffix == ".yaml" and "models" in (content := yaml.safe_load(text)):
        content["models"] = {**(content["models"] or {}), "smollm2-135m-instruct": {"source": "tiny-llama"}}
        text = yaml.safe_dump(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run_page(blocks: Sequence[Block], folder: Path) -> Ran:
    """Run all blocks of a page, in a folder of its own."""
    module = ModuleType("the_page")
    ran = Ran(folder, vars(module))
    environment = dict(os.environ)
    with a_readers_folder(folder), ran.until_the_end:
        sys.modules[module.__name__] = module
        try:
            for block in blocks:
                run_block(block, ran)
            for block in blocks:
                if block.title and block.title.endswith(".py") and "not run" not in block.marks:
                    used = Path(block.title).stem in sys.modules or block.title in ran.files_run
                    assert used, f"{block.place}: {block.title} is never imported or run"
        finally:
            del sys.modules[module.__name__]
            os.environ.clear()
            os.environ.update(environment)
    return ran


def run_block(block: Block, ran: Ran) -> None:
    """Run one block as its language and marks say."""
    if block.title:
        write_file(ran.folder / block.title, block.text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), _ending_as_said(block):
        if block.language == "python" and not block.title and "not run" not in block.marks:
            linecache.cache[block.place] = (len(block.text), None, block.text.splitlines(True), block.place)
            exec(compile(block.text, block.place, "exec", dont_inherit=True), ran.names)
        elif block.language == "python":
            compile(block.text, block.place, "exec")
        elif block.language == "sh":
            for words in commands_of(block):
                run_command(words, block, ran)
                if made := _A_KEY_ID.findall(printed.getvalue()):
                    ran.real[_KEY_ID] = made[-1]
        elif block.language == "yaml":
            read_yaml(block, ran.folder)
        elif block.language in ("json", "jsonl"):
            read_rows(block)
    ran.printed[block.place] = printed.getvalue()


@contextlib.contextmanager
def _ending_as_said(block: Block) -> Iterator[None]:
    words = block.marks.get("refused")
    if words is None:
        yield
        return
    with pytest.raises(UserError) as refused:
        yield
    assert words in f"error[{refused.value.code}]: {refused.value}", f"{block.place}: {refused.value}"


def run_command(words: Sequence[str], block: Block, ran: Ran) -> None:
    """Run one command line, or only parse it where the block is not run."""
    runs = "not run" not in block.marks
    for shown, real in ran.real.items():
        words = [word.replace(shown, real) for word in words]
    match list(words):
        case ["firesteel", "serve", *arguments] if runs:
            ran.real |= ran.until_the_end.enter_context(serving(arguments))
        case ["firesteel", *arguments] if runs:
            status = app(arguments, prog_name="firesteel", standalone_mode=False)
            assert status in (None, 0), f"{block.place}: {shlex.join(words)}: exit status {status}"
        case ["firesteel", *arguments]:
            parse_command(arguments)
        case ["python", script, *arguments] if runs:
            ran.files_run.add(script)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [script, *arguments])
                runpy.run_path(script, run_name="__main__")
        case ["export", *assignments] if runs:
            os.environ.update(dict(assignment.split("=", 1) for assignment in assignments))
        case ["pip", "install", named] if runs:
            refuse_what_is_not_installed(named)
        case ["make", target, *_] if not runs:
            known = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert target in known, f"{block.place}: make has no target {target}"
        case _:
            assert not runs, (
                f"{block.place}: `{shlex.join(words)}` cannot be run here; say why before the block"
            )


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[dict[str, str]]:
    """`firesteel serve` with these arguments and a free port: what its address and key on a page are."""
    program = "from firesteel.cli.main import run; run()"
    command = [sys.executable, "-c", program, "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            address, key = (process.stdout.readline().strip() for _ in range(2))
            yield {
                _ADDRESS: address.removeprefix("firesteel serve: "),
                _KEY: key.removeprefix("key: "),
            }
        finally:
            process.terminate()


def refuse_what_is_not_installed(named: str) -> None:
    """What `pip install 'firesteel[extra]'` would bring must be here: an installation of its own takes minutes."""
    package, extra = named.rstrip("]").split("[")
    required = [Requirement(line) for line in metadata.requires(package) or ()]
    brought = [r.name for r in required if r.marker and r.marker.evaluate({"extra": extra})]
    assert brought, f"{package} has no extra {extra}"
    for name in brought:
        metadata.version(name)


def read_yaml(block: Block, folder: Path) -> None:
    """A catalogue, or settings of the recipe that the title names (`dpo.yaml`)."""
    from training.recipes import dpo_loop, orpo_loop, sft_loop

    content = yaml.safe_load(block.text)
    if content.keys() & {"models", "shapes"}:
        shown = folder / "shown.yaml"
        shown.write_text(block.text, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FIRESTEEL_CATALOG", str(shown))
            catalog = load_catalog()
        for name in content.get("models", ()):
            catalog.resolve_model(name)
        for name in content.get("shapes", ()):
            catalog.shape(name)
        return
    recipe = {"orpo": orpo_loop, "sft": sft_loop}.get(Path(block.title or "").stem, dpo_loop)
    recipe.Config(**content)


def read_rows(block: Block) -> None:
    """Rows of data, one a line or (`json`) one over several lines."""
    rows = [block.text] if block.language == "json" else block.text.splitlines()
    for number, row in enumerate(rows, 1):
        preference = claimed(json.loads(row), preference_data.FORMATS) is not None
        read = preference_data.read_row if preference else read_sft_row
        read(row.encode(), number)
