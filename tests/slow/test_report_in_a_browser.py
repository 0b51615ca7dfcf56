"""A report in Debian's Chromium, without a network: on a phone, on a desk, in the dark and on paper."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_orpo
from runs import config, write_rows

from browser import Browser, browser
from training.recipes import dpo_loop, orpo_loop
from training.utils.report import write_report

pytestmark = pytest.mark.slow
PHONE, DESK = 390, 1280
WIDE_WORD = "unbreakable" * 40


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report of one run, and one of three; some texts are as awkward as data can be."""
    made = tmp_path_factory.mktemp("reports")
    heldout = Path(write_rows(made / "heldout.jsonl", 8, start=50))
    rows = [json.loads(line) for line in heldout.read_text().splitlines()]
    rows[0]["prompt"][0]["content"] = f"<script>document.title = 'broken into'</script> {WIDE_WORD}"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "eval_dataset": str(heldout),
        "eval_interval": 2,
        "epochs": 3,
        "sample_prompts": [WIDE_WORD],
        "sample_max_tokens": 8,
    }
    for name in ("one", "a-run-with-" + "-".join(["a-long-name"] * 8)):
        dpo_loop.main(config(made, log_path=str(made / name), **given))
    orpo_loop.main(test_orpo.config(made, log_path=str(made / "orpo"), eval_dataset=str(heldout)))
    runs = [path for path in sorted(made.iterdir()) if path.is_dir()]
    return [write_report([made / "one"]), write_report(runs, made / "three.html")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("which", [0, 1], ids=["one run", "three runs"])
@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_nothing_is_wider_than_the_screen_or_comes_from_elsewhere(
    pages: list[Path], chromium: Browser, which: int, width: int, tmp_path: Path
) -> None:
    chromium.open(pages[which], width)
    assert chromium.value("document.documentElement.scrollWidth") <= width
    assert chromium.requests == []
    assert chromium.complaints == []
    assert chromium.value("document.title").startswith("Firesteel: ")
    widths = chromium.value(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(widths) >= 9
    assert max(widths) <= width
    assert min(widths) >= min(280, width - 40)
    shown = "[...document.querySelectorAll('tbody th')].filter(cell => cell.checkVisibility())"
    narrow = f"{shown}.filter(cell => cell.getBoundingClientRect().width < 80)"
    assert chromium.value(f"{narrow}.map(cell => cell.textContent)") == []  # no column of single letters
    keep_screenshot(chromium, f"{which}-{width}", tmp_path)


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_letters_of_a_chart_can_be_read_and_do_not_lie_over_each_other(
    pages: list[Path], chromium: Browser, width: int
) -> None:
    chromium.open(pages[0], width)
    smallest = chromium.value(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 10
    overlapping = chromium.value(
        """
        [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
            .filter(([b, q]) => p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom)
            .map(([b]) => a + ' over ' + b));
        })
        """
    )
    assert overlapping == []
    outside = chromium.value(
        """
        [...document.querySelectorAll('figure svg')].flatMap(svg => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll('text')].filter(t => {
            const r = t.getBoundingClientRect();
            return r.left < box.left - 1 || r.right > box.right + 8 || r.bottom > box.bottom + 2;
          }).map(t => t.textContent);
        })
        """
    )
    assert outside == []


def test_text_stands_out_from_its_page_in_light_and_in_dark(pages: list[Path], chromium: Browser) -> None:
    """At least 4.5 to 1 for words, 3 to 1 for lines: WCAG AA."""
    for dark in (False, True):
        chromium.open(pages[0], DESK, dark=dark)
        colours = chromium.value(
            """
            Object.fromEntries(
              'page panel ink soft yes no unclear c0 c1 c2 c3 c4 c5 c6'.split(' ').map(
                n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()]))
            """
        )
        for name, colour in colours.items():
            if name in ("page", "panel"):
                continue
            least = 3.0 if name.startswith("c") else 4.5
            for ground in ("page", "panel"):
                assert contrast(colour, colours[ground]) >= least, (dark, name, ground)
        ground = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 24, 28)") == dark


def test_on_paper_all_is_open_and_no_chart_is_cut(
    pages: list[Path], chromium: Browser, tmp_path: Path
) -> None:
    chromium.open(pages[0], DESK)
    visible = "[...document.querySelectorAll('details table')].map(table => table.checkVisibility())"
    assert chromium.value(visible) == [False] * 3  # closed on the screen
    chromium.send("Emulation.setEmulatedMedia", media="print")
    assert chromium.value(visible) == [True] * 3
    unbroken = (
        "[...document.querySelectorAll('figure')].every(f => getComputedStyle(f).breakInside === 'avoid')"
    )
    assert chromium.value(unbroken)
    chromium.send("Emulation.setEmulatedMedia", media="")
    paper = tmp_path / "page.pdf"
    chromium.print(paper)
    assert paper.read_bytes().startswith(b"%PDF")


def contrast(one: str, other: str) -> float:
    """By the formula of WCAG."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def keep_screenshot(chromium: Browser, name: str, folder: Path) -> None:
    """Where FIRESTEEL_SCREENSHOTS names a folder, there, to be looked at."""
    kept = Path(os.environ.get("FIRESTEEL_SCREENSHOTS", folder))
    chromium.screenshot(kept / f"report-{name}.png")
    assert (kept / f"report-{name}.png").stat().st_size > 20_000
