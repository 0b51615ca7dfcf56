"""`firesteel data …`: what is wrong with a data file, how it looks to the model, and the same in another form."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from firesteel.cli.recipes import read_settings, settings_of
from firesteel.sdk.errors import ConfigError

if TYPE_CHECKING:
    from training.utils.data_check import Check, FileReport
    from training.utils.rendering import Renderer
    from training.utils.row_check import RowKind
    from training.utils.row_limit import RowLimit
    from training.utils.training_settings import TrainingSettings

app = typer.Typer(
    help="Check, convert and preview training data.", no_args_is_help=True, rich_markup_mode=None
)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Model = Annotated[
    str | None, typer.Option("--model", help="Count and check in the tokens of this model.", metavar="NAME")
]
_Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="The same, of a tokenizer from elsewhere.", metavar="NAME")
]
_Longest = Annotated[
    int | None,
    typer.Option(
        "--max-seq-len",
        min=2,
        help="Longest row in tokens. [default: what --model takes; with --tokenizer alone, no limit]",
        metavar="N",
        show_default=False,
    ),
]
_Truncate = Annotated[
    Literal["drop", "response_end"] | None,
    typer.Option(help="What a run does with longer rows. [default drop]", show_default=False),
]
_OnBadRow = Annotated[
    Literal["fail", "skip"] | None,
    typer.Option(
        help="With skip, rows that cannot be used are a warning only. [default fail]", show_default=False
    ),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --estimate: one setting.")
]


@app.command()
def check(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE…", help="JSONL files, gzipped or not.")
    ] = None,
    model: _Model = None,
    tokenizer: _Tokenizer = None,
    heldout: Annotated[
        Path | None, typer.Option(help="File of held-out rows: checked too, and compared.")
    ] = None,
    max_seq_len: _Longest = None,
    truncate: _Truncate = None,
    on_bad_row: _OnBadRow = None,
    estimate: Annotated[
        Path | None,
        typer.Option(
            help="Settings of a run: check as it would, then make its first steps and say what it will take.",
            metavar="CONFIG.yaml",
        ),
    ] = None,
    recipe: Annotated[
        Literal["dpo", "orpo", "sft"], typer.Option(help="With --estimate: whose settings.")
    ] = "dpo",
    set_: _Set = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    list_all: Annotated[bool, typer.Option("--all", help="List every row that is lost.")] = False,
    as_json: _Json = False,
) -> None:
    """Say what a run would refuse, drop or cut, and what looks wrong. Exit code 2: something must be mended."""
    flags = _Flags(model, tokenizer, max_seq_len, truncate, on_bad_row)
    if set_ and not estimate:
        raise ConfigError("--set is a setting of the run that --estimate names; give that too")
    config = _settings(estimate, recipe, set_ or [], files or [], heldout) if estimate else None
    if config is not None:
        _refuse_beside_estimate(flags)
        files, heldout = [Path(config.dataset)], Path(config.eval_dataset) if config.eval_dataset else None
    if not files:
        raise ConfigError("no FILE is given, and no settings (--estimate) that name one")
    from training.utils.row_kinds import kind_of

    kind = config.learner.rows if config is not None else kind_of(files)
    checked_as = flags.checked_as() if config is None else _as_run(config)
    reports = _check(checked_as, kind, list_all=list_all, on_stderr=as_json).files(
        [str(path) for path in files], str(heldout) if heldout else None
    )
    bad = any(
        report.of_level(level) for report in reports for level in (_COUNTED if strict else _COUNTED[:1])
    )
    if not as_json:
        compared = sum(report.usable > 0 for report in reports[: len(files)]) > 1
        _print_reports(reports, checked_as, compared=compared)
    cost = None
    if config is not None and not bad:
        from training.utils.data_estimate import estimate as estimate_run
        from training.utils.progress import Display

        cost = estimate_run(config, Display(on_stderr=True))
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "usable": not bad,
                    "model": checked_as.name,
                    "max_seq_len": checked_as.limit.tokens,
                    "max_seq_len_is": checked_as.limit.says if checked_as.renderer else None,
                    "files": [_plain(asdict(report)) for report in reports],
                    "estimate": cost and asdict(cost),
                },
                indent=1,
                ensure_ascii=False,
            )
        )
    elif cost is not None:
        for line in cost.lines():
            typer.echo(line)
    raise typer.Exit(2 if bad else 0)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file, gzipped or not.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="Of preferences: messages, preferred_output, prompt-messages, message-lists, prompt-text, text, "
            "samples or completions. Of supervised rows, and with --side: messages, completion, alpaca, sharegpt "
            "or text.",
        ),
    ],
    side: Annotated[
        Literal["chosen", "rejected"] | None,
        typer.Option(
            help="Make supervised rows of one answer of each preference, of a list the best or the worst: chosen is "
            "for `firesteel sft`, rejected to be looked at. FORM alone cannot say it: messages and text are forms "
            "of both.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, gzipped if it ends in .gz; default: standard output.")
    ] = None,
    on_bad_row: Annotated[
        Literal["fail", "skip"],
        typer.Option(
            help="A row that cannot be converted ends it with nothing written, or is left out and told."
        ),
    ] = "fail",
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is there.")] = False,
) -> None:
    """Write the rows of a file in another form. What would lose or add something is refused with its line."""
    from training.utils.data_forms import Target, convert_file

    if out is not None and out.exists():
        if out.samefile(file):
            raise ConfigError(f"--out {out}: that is the file itself; name another")
        if not force:
            raise ConfigError(f"--out {out}: there is such a file; --force replaces it")
    target = Target(to, side)
    converted = convert_file(str(file), target, out, on_bad_row, lambda line: typer.echo(line))
    for error in converted.refused:
        typer.echo(f"left out: {error}", err=True)
    more = converted.refused_count - len(converted.refused)
    typer.echo(f"and {more:,} more\n" if more else "", err=True, nl=False)
    typer.echo(f"{converted.rows:,} rows converted, {converted.refused_count:,} left out", err=True)
    if target.remark:
        typer.echo(target.remark, err=True)


@app.command()
def preview(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL file, gzipped or not.")],
    model: _Model = None,
    tokenizer: _Tokenizer = None,
    rows: Annotated[int, typer.Option(min=1, help="So many rows that make pairs.")] = 3,
    max_seq_len: _Longest = None,
    truncate: _Truncate = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Mark where tokens end, in text too.")] = False,
    as_json: _Json = False,
) -> None:
    """Show rows as the model will see them: every token decoded, and which of them are scored."""
    from firesteel.cli.token_display import print_previews
    from training.utils.data_preview import previews
    from training.utils.row_kinds import kind_of
    from training.utils.row_outcomes import Rendering

    shown_as = _Flags(model, tokenizer, max_seq_len, truncate, None).checked_as()
    if shown_as.renderer is None:
        raise ConfigError("a preview needs a model's tokenizer and template: give --model")
    rules = Rendering(shown_as.limit.tokens, truncate or "drop")
    found = previews(str(file), shown_as.renderer, kind_of([file]), rules, rows)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=1, ensure_ascii=False))
    else:
        print_previews(found, borders=tokens)
    typer.echo(shown_as.limit.line, err=as_json)


_COUNTED: tuple[Literal["error", "warning"], ...] = ("error", "warning")


@dataclass(frozen=True)
class _Flags:
    """How rows are to be read, as far as the command line says."""

    model: str | None
    tokenizer: str | None
    max_seq_len: int | None
    truncate: Literal["drop", "response_end"] | None
    on_bad_row: Literal["fail", "skip"] | None

    def checked_as(self) -> _CheckedAs:
        """As a run on this model would read them."""
        from training.utils.rendering import Renderer
        from training.utils.row_limit import RowLimit

        name = self.tokenizer or self.model
        if name is None and self.max_seq_len is not None:
            raise ConfigError("--max-seq-len counts tokens, and those are a model's: give --model too")
        renderer = Renderer.load(name) if name else None  # first: it fetches small models whole
        if self.max_seq_len is not None:
            limit = RowLimit(self.max_seq_len, "by --max-seq-len")
        elif self.model is not None:
            limit = RowLimit.of_model(self.model)
        else:
            limit = RowLimit(None, "a tokenizer alone has none")
        return _CheckedAs(name, renderer, limit, self.truncate or "drop", self.on_bad_row or "fail")


@dataclass(frozen=True, eq=False)
class _CheckedAs:
    """How rows are read."""

    name: str | None
    """Of the tokenizer."""
    renderer: Renderer | None
    limit: RowLimit
    truncate: Literal["drop", "response_end"]
    on_bad_row: Literal["fail", "skip"]


def _refuse_beside_estimate(given: _Flags) -> None:
    if any(asdict(given).values()):
        raise ConfigError(
            "with --estimate, model and limits are the run's own: use --set, as --set max_seq_len=512"
        )


def _as_run(config: TrainingSettings) -> _CheckedAs:
    """As this run would read them."""
    from training.utils.rendering import Renderer
    from training.utils.row_limit import RowLimit

    name = config.tokenizer_model or config.base_model
    limit = RowLimit.of_run(config)
    return _CheckedAs(name, Renderer.load(name), limit, config.truncate, config.on_bad_row)


def _settings(
    file: Path,
    recipe: Literal["dpo", "orpo", "sft"],
    assignments: list[str],
    files: list[Path],
    heldout: Path | None,
) -> TrainingSettings:
    """Of the run to estimate; a FILE on the command line takes the place of its own."""
    values = read_settings(file, assignments)
    if len(files) > 1:
        raise ConfigError("--estimate is of a run, which has one FILE")
    values |= {"dataset": str(files[0])} if files else {}
    values |= {"eval_dataset": str(heldout)} if heldout else {}
    values.setdefault("log_path", "runs/estimated")  # nothing is written there
    return settings_of(recipe, values, "give --recipe {recipe}")


def _check(checked_as: _CheckedAs, kind: RowKind[Any], *, list_all: bool, on_stderr: bool) -> Check:
    from training.utils.data_check import Check
    from training.utils.progress import Display
    from training.utils.row_outcomes import Rendering

    rules = Rendering(checked_as.limit.tokens, checked_as.truncate, checked_as.on_bad_row)
    return Check(checked_as.renderer, kind, rules, list_all, Display(on_stderr=on_stderr).reading)


def _print_reports(reports: list[FileReport], checked_as: _CheckedAs, *, compared: bool) -> None:
    from training.utils.data_check_text import report_lines
    from training.utils.progress import Display

    display = Display()
    if checked_as.renderer is not None:
        display.say(checked_as.limit.line)
    for report in reports:
        for line in report_lines(report):
            display.say(line)
    if compared:
        display.say(
            "Files were compared too: what rows of two files have in common is told at the later one."
        )
    if checked_as.renderer is None:
        display.say(
            "Without --model only what needs no tokens was checked: not the chat template, not lengths in tokens."
        )
    errors, warnings = (sum(len(report.of_level(level)) for report in reports) for level in _COUNTED)
    display.say(f"errors: {errors}, warnings: {warnings}")


def _plain(value: Any) -> Any:
    """As JSON has it: a number that is none is null."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
