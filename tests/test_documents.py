"""What the documents show is run as it stands."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from documents import ROOT, Ran, blocks_of, commands_of, pages, run_page
from firesteel.catalog import load_catalog
from firesteel.cli.main import app
from firesteel.sdk import FiresteelError, errors
from training.utils import preference_data, sft_data
from training.utils.row_forms import RowForm

BLOCKS = {str(page.relative_to(ROOT)): blocks_of(page) for page in pages()}
RUN = [page for page, blocks in BLOCKS.items() if any(block.language != "text" for block in blocks)]

# How many blocks of a page are not run here, each with its reason beside it: they set up the project; CI runs them.
NOT_RUN = {"README.md": 1, "CONTRIBUTING.md": 1}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Pages that were run, by name: each once, when the first test asks."""
    folders = {page: tmp_path_factory.mktemp("page") for page in RUN}

    class Pages(dict[str, Ran]):
        def __missing__(self, page: str) -> Ran:
            self[page] = run_page(BLOCKS[page], folders[page])
            return self[page]

    return Pages()


@pytest.mark.parametrize("page", RUN)
def test_every_block_of_this_page_runs_in_its_order(page: str, ran: dict[str, Ran]) -> None:
    assert len(ran[page].printed) == len(BLOCKS[page])


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    left_out = Counter(
        page for page, blocks in BLOCKS.items() for block in blocks if "not run" in block.marks
    )
    assert left_out == NOT_RUN


@pytest.mark.parametrize("page", BLOCKS)
def test_no_command_hides_in_a_block_of_text(page: str) -> None:
    texts = [block for block in BLOCKS[page] if block.language == "text"]
    first_words = [(block.place, line.split()[:1]) for block in texts for line in block.text.splitlines()]
    hidden = (
        "firesteel",
        ".venv/bin/firesteel",
        "python",
        "pip",
        "make",
        "import",
        "from",
        "export",
        "$",
        ">>>",
    )
    assert not [place for place, word in first_words if word and word[0] in hidden]


def test_the_loop_in_the_readme_starts_at_ln_2_and_falls(ran: dict[str, Ran]) -> None:
    printed = ran["README.md"].printed_after("firesteel.connect()", BLOCKS["README.md"])
    losses = [float(value) for value in re.findall(r"'loss:sum': ([0-9.]+)", printed)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2


def test_the_run_in_the_readme_gives_an_adapter_that_loads_as_it_says(ran: dict[str, Ran]) -> None:
    names = ran["README.md"].names
    assert names["summary"].export_path == "runs/mine/adapter"
    prompt = names["tokenizer"]("Hello", return_tensors="pt")
    assert names["model"](**prompt).logits.shape[-1] >= len(names["tokenizer"])


@pytest.mark.parametrize(
    ("part", "read", "forms"),
    [
        ("Preference rows", preference_data.read_row, preference_data.FORMATS),
        ("Supervised rows", sft_data.read_sft_row, sft_data.FORMATS),
    ],
)
def test_the_page_on_data_has_a_row_of_every_form_under_its_name(
    part: str, read: Callable[[bytes, int], tuple[str, Any]], forms: Sequence[RowForm[Any]]
) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {part}$.*?(?=^## )", page, re.MULTILINE | re.DOTALL)
    sections = re.findall(r"^### `([\w-]+)`$(.*?)(?=^###|\Z)", part, re.MULTILINE | re.DOTALL)
    for name, section in sections:
        for row in re.findall(r"```json\n(.*?)```", section, re.DOTALL):
            assert read(row.encode(), 1)[0] == name
    assert [name for name, _ in sections] == [form.name for form in forms]


def test_the_page_on_curves_explains_every_number_that_is_logged_and_no_other(ran: dict[str, Ran]) -> None:
    # In these runs no step is skipped, every chosen answer is the shorter one, and all numbers are finite.
    elsewhere = {"train/skipped_steps", "eval/accuracy_length_controlled", "eval/nonfinite_rows"}
    logged = {name for line in ran["docs/curves.md"].names["lines"] for name in line} | elsewhere
    page = (ROOT / "docs/curves.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`((?:train|eval|reference|rewards|logps|delta_logp)/[a-z_/]+)`", page))
    assert explained - logged == set()

    def is_explained(name: str) -> bool:
        """By its name, or by that of the same number of a step."""
        bare = name.removeprefix("eval/")
        return bool({name, bare, f"train/{bare}"} & explained) or bool(re.match("source/[^/]+/", bare))

    assert {name for name in logged if not is_explained(name)} == {"train/step"}


def test_the_catalogue_in_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in BLOCKS["README.md"] if block.language == "yaml"]
    (tmp_path / "catalog.yaml").write_text(block.text, encoding="utf-8")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "catalog.yaml"))
    catalog = load_catalog()
    assert catalog.resolve_model("Qwen/Qwen3-8B").name == "smollm2-135m-instruct"
    assert catalog.shape("accounts/fireworks/trainingShapes/qwen3-8b-128k-h200").device == "cpu"


@pytest.mark.parametrize("name", ["index.md", "configuration.md"])
def test_a_page_that_is_made_of_something_else_is_as_it_would_be_made_now(name: str) -> None:
    """`make docs` makes it anew."""
    made = runpy.run_path(str(ROOT / "docs/generate.py"))["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made


def test_the_site_builds_without_a_warning_and_asks_no_other_machine_for_anything(tmp_path: Path) -> None:
    """Links and anchors are checked by the builder; what its pages load is checked here."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # the builder writes beside them
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    built = subprocess.run(
        [Path(sys.executable).parent / "zensical", "build", "--clean", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "build/site"
    shown = {page.relative_to(site).with_suffix(".md") for page in site.rglob("*.html")} - {Path("404.md")}
    assert shown == {page.relative_to(ROOT / "docs") for page in ROOT.glob("docs/**/*.md")}
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?:)?//')
    assert not [page for page in site.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))]


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/.-]+\.md", str(navigation))
    assert Counter(listed) == Counter(
        str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")
    )


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in (*pages(), ROOT / "docs/index.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def texts_in_the_source() -> Iterator[str]:
    """Every string of the source, with … where a value is put in."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_in_troubleshooting_is_one_of_the_program_s() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`+)(.+?)\1 \|", page, re.MULTILINE)
    quoted = [message for _, message in rows]
    source = "\n".join(" ".join(text.split()) for text in texts_in_the_source())
    patterns = {message: re.escape(message).replace("…", "[^\n]*") for message in quoted}
    assert len(quoted) > 60
    assert not [message for message, pattern in patterns.items() if not re.search(pattern, source)]


def test_every_error_code_is_in_troubleshooting() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    opening, *headings = [part.split("\n", 1)[0] if n else part for n, part in enumerate(page.split("\n## "))]
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FiresteelError)
    ]
    explained = opening + "".join(headings)
    assert {kind.code for kind in kinds if f"`{kind.code}`" not in explained} == set()


def verbs(command: Any, before: str = "firesteel") -> Iterator[str]:
    """Every command line up to its options."""
    if not isinstance(command, TyperGroup):
        yield before
        return
    for name, inner in command.commands.items():
        yield from verbs(inner, f"{before} {name}")


def test_every_verb_of_the_command_line_has_an_example() -> None:
    blocks = [block for block in BLOCKS["docs/commands.md"] if block.language == "sh"]
    shown = [" ".join(words) for block in blocks for words in commands_of(block)]
    wanted = list(verbs(typer.main.get_command(app)))
    assert len(wanted) > 10
    assert not [verb for verb in wanted if not any(line.startswith(verb) for line in shown)]
