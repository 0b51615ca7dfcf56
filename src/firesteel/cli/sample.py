"""`firesteel sample`: what a trained model answers, beside its base model if asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from firesteel.sdk.errors import ConfigError, UserError

if TYPE_CHECKING:
    from training.utils.sampling import Exchange, SampledAnswer, Sampling, Tried


def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or a model's name or folder.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What the user says; give it again for more [default: the lines of standard input]."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer, too.")] = False,
    step: Annotated[int | None, typer.Option(help="Of this step's checkpoint; default: the newest.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer [default 256, or what the model has room for].")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy: always the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the same answer again.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object per prompt, a line each.")
    ] = False,
) -> None:
    """Try a result: ask a trained model something."""
    from training.utils.sampling import Sampling, subject_of, trying

    if empty := [text for text in prompt or [] if not text.strip()]:
        raise ConfigError(f"--prompt {empty[0]!r} says nothing; write what the user asks")
    sampling = Sampling(max_tokens, temperature, seed)
    subject = subject_of(run, step, base)
    with trying(subject) as tried:
        typer.echo(f"sampling: {tried.subject.described}", err=True)
        if prompt:
            exchanges: Iterator[Exchange] = iter(tried.exchanges(prompt, sampling, base))
        else:
            if base and subject.lora is None:
                typer.echo("two models are held in memory; with --prompt it is one after the other", err=True)
            exchanges = _conversation(tried, sampling, base)
        for exchange in exchanges:
            typer.echo(json.dumps(asdict(exchange)) if as_json else _shown(exchange))


def _conversation(tried: Tried, sampling: Sampling, base: bool) -> Iterator[Exchange]:
    """An answer to each line that comes in. At a terminal a line that cannot be answered does not end it."""
    at_terminal, empty = sys.stdin.isatty(), 0
    for line in _typed_lines() if at_terminal else sys.stdin:
        if not line.strip():
            empty += 1
            continue
        try:
            yield tried.exchange(line.rstrip("\r\n"), sampling, base)
        except UserError as error:
            if not at_terminal:
                raise
            typer.echo(f"error[{error.code}]: {error}", err=True)
    if empty and not at_terminal:
        typer.echo(f"skipped: {empty} empty lines", err=True)


def _typed_lines() -> Iterator[str]:
    typer.echo("each line is a message of its own; Ctrl-D ends", err=True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _shown(exchange: Exchange) -> str:
    lines = [f"Q: {exchange.prompt}"]
    if exchange.base is not None:
        lines.append(f"  base:    {_said(exchange.base)}")
    name = "A:" if exchange.base is None else "  trained:"
    return "\n".join([*lines, f"{name} {_said(exchange.answer)}", ""])


def _said(answer: SampledAnswer) -> str:
    return answer.text + (
        f" … (cut at {answer.tokens} tokens; --max-tokens allows more)" if answer.cut else ""
    )
