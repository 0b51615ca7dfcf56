"""What is installed beside this package, and what of the environment it reads. Imports none of what it looks at."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from firesteel.finding import Finding

# What a run's numbers depend on: named one by one, the others together.
_MATTER = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
_FOR_DEVELOPERS = {"dev", "slow"}

VARIABLES: Mapping[str, str] = {
    "FIRESTEEL_HOME": "where models and caches are",
    "FIRESTEEL_CATALOG": "more models and shapes",
    "FIRESTEEL_DEVICE": "the only kind of device to use",
    "FIRESTEEL_KEEP_MEMORY": "0: freed memory goes back to the system",
    "FIRESTEEL_BASE_URL": "the server to train at",
    "FIRESTEEL_API_KEY": "the key for it",
    "FIREWORKS_BASE_URL": "the same, for code of the guide",
    "FIREWORKS_API_KEY": "the same, for code of the guide",
    "HF_HUB_OFFLINE": "1: nothing is asked of the Hugging Face hub",
    "HF_ENDPOINT": "another Hugging Face hub",
    "HF_HOME": "where the hub's own cache is",
    "HF_TOKEN": "for gated and private models",
    "OMP_NUM_THREADS": "how many threads compute",
    "MKL_NUM_THREADS": "how many threads compute in MKL",
    "TORCH_NUM_THREADS": "not read by torch; OMP_NUM_THREADS is",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "WANDB_MODE": "how Weights & Biases logs",
    "WANDB_API_KEY": "the key for it",
    "TRACKIO_DIR": "where trackio keeps runs",
    "TRACKIO_SPACE_ID": "the Space that trackio sends runs to",
    "TRACKIO_SERVER_URL": "the server that trackio sends runs to",
}
"""What is read of the environment, here or by the libraries that compute."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")


@dataclass(frozen=True)
class Need:
    """A package that this one needs, or an extra of it."""

    requirement: Requirement
    extra: str | None
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is there, in a version that is allowed."""
        return self.installed is not None and self.requirement.specifier.contains(self.installed, True)


def findings() -> Iterator[Finding]:
    """Packages, then extras, then the environment."""
    try:
        needs = _needs()
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "packages", "firesteel", "runs from a folder that is not installed, so what it needs is not known", "note",
            "pip install -e .",
        )  # fmt: skip
    else:
        yield from _packages([need for need in needs if need.extra is None])
        for extra in sorted({need.extra for need in needs if need.extra} - _FOR_DEVELOPERS):
            yield _extra(extra, [need for need in needs if need.extra == extra])
    yield from environment(os.environ)


def _needs() -> list[Need]:
    found = []
    extras = importlib.metadata.metadata("firesteel").get_all("Provides-Extra") or []
    for text in importlib.metadata.requires("firesteel") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        wanted_by = [None] if marker is None or marker.evaluate({"extra": ""}) else [
            extra for extra in extras if marker.evaluate({"extra": extra})
        ]  # fmt: skip
        found += [Need(requirement, extra, _installed(requirement.name)) for extra in wanted_by]
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(needs: list[Need]) -> Iterator[Finding]:
    pins = _pins()
    others = []
    for need in needs:
        name = canonicalize_name(need.requirement.name)
        pin = pins.get(name)
        values = {"installed": need.installed, "tested": pin, "needed": str(need.requirement.specifier)}
        if not need.fits:
            there = need.installed or "not installed"
            todo = f"pip install '{name}=={pin}'" if pin else f"pip install '{need.requirement}'"
            says = f"{there}; {need.requirement} is needed"
            yield Finding("packages", name, says, "problem", todo, values)
        elif name in _MATTER and pin and _release(need.installed) != pin:
            says = f"{need.installed}; tested with {pin}: it may work as well, and give other last bits"
            yield Finding("packages", name, says, "note", f"pip install '{name}=={pin}'", values)
        elif name in _MATTER:
            yield Finding(
                "packages",
                name,
                f"{need.installed}, as tested" if pin else str(need.installed),
                values=values,
            )
        else:
            others.append(name)
    yield Finding("packages", f"{len(others)} others", "as needed", values={"names": others})


def _release(version: str | None) -> str:
    """Without the part that says how it was built: `2.13.0+cpu`."""
    return (version or "").partition("+")[0]


def _pins() -> dict[str, str]:
    """The versions that the tests run with; none where the file is not there."""
    here = Path(__file__)
    for file in (here.with_name("constraints.txt"), here.parents[2] / "constraints.txt"):
        if file.is_file():
            pairs = (
                line.split("==") for line in file.read_text(encoding="utf-8").splitlines() if "==" in line
            )
            return {canonicalize_name(name): version.strip() for name, version in pairs}
    return {}


def _extra(extra: str, needs: list[Need]) -> Finding:
    missing = [need.requirement.name for need in needs if not need.fits]
    values = {"missing": missing}
    if missing:
        says = f"not installed ({', '.join(missing)})"
        return Finding("extras", extra, says, "note", f"pip install 'firesteel[{extra}]'", values)
    return Finding("extras", extra, "installed", values=values)


def environment(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Those that are set and read, with keys masked; and those of our name that nothing reads."""
    for name, what in VARIABLES.items():
        if name in variables:
            value = masked(name, variables[name])
            yield Finding("environment", name, f"{value} ({what})", values={"value": value})
    for name in sorted(variables):
        if name.startswith("MALLOC_"):
            yield Finding("environment", name, f"{variables[name]} (so the allocator is left as it is)")
        if name.startswith("FIRESTEEL_") and name not in VARIABLES:
            yield Finding("environment", name, "is read by nothing here", "note", "check how it is spelled")


def masked(name: str, value: str) -> str:
    """A value as it may be shown: of a key its length only, of a URL no password."""
    if _SECRET.search(name):
        return f"set, {len(value)} characters" if value else "set, empty"
    return re.sub(r"(?<=://)[^/@\s]*@", "…@", value)
