"""`firesteel doctor`: the machine, what is installed and kept on it, and whether a config can run here.

What needs no torch comes first, and is printed as it is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from firesteel.finding import Finding, size
from firesteel.sdk.errors import FiresteelError

if TYPE_CHECKING:
    from training.utils.training_settings import TrainingSettings

_SERVER_SECONDS = 3
_SIGNS = {"ok": "ok", "note": "--", "problem": "!!"}


def doctor(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Settings of a run: can it run here?")
    ] = None,
    recipe: Annotated[
        Literal["dpo", "orpo", "sft"], typer.Option(help="Which recipe these are for.")
    ] = "dpo",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Look at this machine and installation, and at what a config will need. Exit code 2: a run would stop."""
    found: list[Finding] = []
    for finding in _findings(config_file, recipe):
        if not as_json:
            _print(finding, new_section=not found or found[-1].section != finding.section)
        found.append(finding)
    problems = [finding for finding in found if finding.verdict == "problem"]
    if as_json:
        content = {"fine": not problems, "findings": [asdict(finding) for finding in found]}
        typer.echo(json.dumps(content, indent=1))
    else:
        typer.echo(
            f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            if problems
            else "\nnothing here would stop a run"
        )
    if problems:
        raise typer.Exit(2)


def _print(finding: Finding, new_section: bool) -> None:
    if new_section:
        typer.echo(f"\n{finding.section}")
    todo = f"\n       → {finding.todo}" if finding.todo else ""
    typer.echo(f"  {_SIGNS[finding.verdict]}  {finding.subject}: {finding.says}{todo}")


def _findings(config_file: Path | None, recipe: str) -> Iterator[Finding]:
    from firesteel import installation
    from firesteel.connection import chosen_address

    yield from _machine()
    yield from installation.findings()
    yield _catalogue()
    yield from _kept()
    server = chosen_address()
    if server != "local":
        yield _server(server)
    config: TrainingSettings | None = None
    if config_file is not None:
        try:
            config = _read(config_file, recipe)
        except FiresteelError as error:
            yield Finding("config", str(config_file), str(error), "problem")
    if config is not None:
        from training.utils.needs import findings_before_torch

        yield from findings_before_torch(config)
    yield from _torch(config, remote=server != "local")


def _machine() -> Iterator[Finding]:
    from firesteel import machine, store

    cpu, memory = machine.processor(), machine.memory()
    quota = f", {cpu.quota:g} by the container's quota" if cpu.quota is not None else ""
    says = f"{cpu.model}, {cpu.usable} of {cpu.cores} cores may be used{quota}"
    yield Finding("machine", "processor", says, values=asdict(cpu))
    limit = f", the container's limit is {size(memory.limit)}" if memory.limit is not None else ""
    says = f"{size(memory.free)} free of {size(memory.total)}{limit}"
    yield Finding("machine", "memory", says, values=asdict(memory))
    home = store.home()
    free = machine.disk_free(home)
    yield Finding("machine", "disk", f"{size(free)} free at FIRESTEEL_HOME, {home}", values={"free": free})


def _catalogue() -> Finding:
    from firesteel.catalog import CATALOG_VARIABLE, load_catalog

    try:
        catalog = load_catalog()
    except FiresteelError as error:  # every run reads it first
        todo = f"mend the file, name another in {CATALOG_VARIABLE}, or unset that"
        return Finding("models", "catalogue", str(error), "problem", todo)
    counts = {"models": len(catalog.models), "shapes": len(catalog.shapes)}
    says = f"{counts['models']} models, {counts['shapes']} training shapes"
    added = f", with those of {catalog.file}" if catalog.file else ""
    return Finding("models", "catalogue", f"{says}{added}", values=counts)


def _kept() -> Iterator[Finding]:
    from firesteel import removal, store
    from training.utils.caches import list_caches

    for folder in store.stored():
        try:
            name, values = (
                store.check(folder).name,
                {"path": str(folder), "bytes": store.size_on_disk(folder)},
            )
            yield Finding(
                "models", name, f"ready, {size(store.size_on_disk(folder))}, {folder}", values=values
            )
        except FiresteelError as error:
            # Of another model than the one that is asked for it stops nothing; of that one the config says so.
            yield Finding("models", folder.name, str(error), "note", f"firesteel models rm {folder.name}")
    if not store.stored():
        yield Finding(
            "models", "store", "empty: a run fetches its model first", "note", "firesteel models list"
        )
    if left := removal.leftovers():
        says = f"{len(left)} of fetches that were killed"
        yield Finding("models", "leftovers", says, "note", "firesteel cache clear leftovers")
    taken = dict.fromkeys(("references", "rows", "tokenizers"), 0)
    for entry in list_caches():
        taken[entry.kind] = taken.get(entry.kind, 0) + entry.bytes
    says = ", ".join(f"{kind} {size(count)}" for kind, count in taken.items())
    yield Finding("caches", "sizes", f"{says} (`firesteel cache list`)", values=taken)


def _server(address: str) -> Finding:
    import httpx2

    from firesteel.connection import chosen_key
    from firesteel.installation import masked

    shown = masked("FIRESTEEL_BASE_URL", address)
    todo = "start it with `firesteel serve`, or set FIRESTEEL_BASE_URL=local to train in this process"
    try:
        headers = {"x-api-key": chosen_key() or ""}
        answer = httpx2.get(f"{address.rstrip('/')}/status", headers=headers, timeout=_SERVER_SECONDS)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Finding("server", shown, f"cannot be reached: {error}", "problem", todo)
    if answer.status_code in (401, 403):
        says = "it does not take this key" if chosen_key() else "it asks for a key"
        return Finding(
            "server", shown, says, "problem", "set FIRESTEEL_API_KEY; `firesteel keys create` makes one"
        )
    if answer.status_code != 200:
        return Finding("server", shown, f"it answers with status {answer.status_code}", "problem", todo)
    return Finding("server", shown, "it answers")


def _read(file: Path, recipe: str) -> TrainingSettings:
    from firesteel.cli.recipes import read_config, settings_of

    # Where the run will be is often said on the command line only; nothing is written there.
    values = {"log_path": "runs/looked-at", **read_config(file)}
    return settings_of(recipe, values, "give --recipe {recipe}")


def _torch(config: TrainingSettings | None, remote: bool) -> Iterator[Finding]:
    import torch

    from firesteel.engine.capacity import capacity_of
    from firesteel.engine.devices import devices_found
    from training.utils.needs import Device, findings_on

    threads = torch.get_num_threads()
    chosen = " by OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else ""
    says = f"{torch.__version__}, computes with {threads} threads{chosen}"
    yield Finding("devices", "torch", says, values={"threads": threads})
    yield from _gpus()
    try:
        kinds = devices_found()
    except FiresteelError as error:
        yield Finding("devices", "FIRESTEEL_DEVICE", str(error), "problem")
        return
    yield Finding("devices", "used", f"{kinds[0]}", values={"kinds": kinds})
    if config is not None and remote:
        yield Finding("needs", "trainer", "at the server: memory and shapes are those there", "note")
    elif config is not None:
        yield from findings_on(config, Device(kinds, capacity_of(kinds[0])))


def _gpus() -> Iterator[Finding]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    version = driver.read_text().splitlines()[0].partition("Module")[2].split()[:1] if driver.exists() else []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            by = version[0] if version else "unknown"
            says = f"{torch.cuda.get_device_name(index)}, {size(free)} free of {size(total)}, driver {by}"
            yield Finding("devices", f"cuda:{index}", says, values={"free": free, "total": total})
        return
    if torch.version.cuda is None:
        why = "this torch is built without CUDA" + ("; there is an NVIDIA driver here" if version else "")
    elif not version:
        why = f"there is no NVIDIA driver; torch is built for CUDA {torch.version.cuda}"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        why = "CUDA_VISIBLE_DEVICES hides them"
    else:
        why = f"driver {version[0]} and torch for CUDA {torch.version.cuda} do not find a GPU"
    note = bool(version)
    yield Finding("devices", "cuda", f"none: {why}", "note" if note else "ok")
