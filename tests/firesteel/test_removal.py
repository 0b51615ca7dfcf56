"""What the store lets go of, and what it does not."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

import firesteel
from firesteel import removal, store
from firesteel.catalog import ModelEntry, load_catalog
from firesteel.sdk import ModelError

TINY = ModelEntry("tiny-llama", "builtin:tiny-llama")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in a store of its own."""
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    return store.fetch(TINY)


def folders(name: str) -> list[Path]:
    return removal.folders_of(name, load_catalog())


def test_a_model_is_found_by_its_name_its_folder_and_the_folders_name(model: Path) -> None:
    assert folders("tiny-llama") == folders(str(model)) == folders(model.name) == [model]
    removed = removal.remove(model, "tiny-llama")
    assert (removed.path, removed.kept_elsewhere, model.exists()) == (str(model), 0, False)
    assert removed.freed > 10**5
    with pytest.raises(ModelError, match="'tiny-llama' is not in the store"):
        folders("tiny-llama")
    assert store.fetch(TINY) == model


def test_a_model_under_a_name_that_means_another_one_by_now_is_found_by_that_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("models:\n  tiny-llama: {source: org/another}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    assert folders("tiny-llama") == [model]


@pytest.mark.parametrize("name", ["mine", "PATH"])
def test_a_folder_of_the_users_is_not_the_stores(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in model.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("models:\n  mine: {source: ./mine}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    with pytest.raises(ModelError, match="which the store only refers to; it is yours, and stays"):
        folders(str(mine) if name == "PATH" else name)
    (store.home() / "models/linked").symlink_to(mine)
    with pytest.raises(ModelError):
        folders("linked")
    assert (mine / "config.json").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "../service", ".lock-x", "/", "nobody"])
def test_nothing_outside_the_store_can_be_named(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (store.home() / "service").mkdir()
    with pytest.raises(ModelError):
        folders(name)


def test_a_model_that_is_being_fetched_stays(model: Path) -> None:
    with model.with_name(f".lock-{model.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match="is being fetched"):
            removal.remove(model, "tiny-llama")
    removal.remove(model, "tiny-llama")


def test_a_model_that_a_trainer_has_loaded_stays_until_the_trainer_is_closed(model: Path) -> None:
    with firesteel.connect() as service:
        client = service.create_training_client("tiny-llama", 0)
        with pytest.raises(ModelError, match="is in use: a run or a server has"):
            removal.remove(model, "tiny-llama")
        client.save_weights(str(model.parents[1] / "saved")).result()  # copies the tokenizer from there
    removal.remove(model, "tiny-llama")
    assert not model.exists()


def test_what_has_a_second_name_is_not_counted_as_freed(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    os.link(weights, tmp_path / "blob")
    removed = removal.remove(model, "tiny-llama")
    assert removed.kept_elsewhere == size
    assert (tmp_path / "blob").stat().st_size == size


def test_what_a_killed_fetch_has_left_is_told_from_a_fetch_under_way(model: Path) -> None:
    partial = model.with_name(f".partial-{model.name}-0a1b2c3d")
    (partial / "model").mkdir(parents=True)
    (partial / "model/half").write_bytes(b"begun")
    with model.with_name(f".lock-{model.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert removal.leftovers() == []
    (left,) = removal.leftovers()
    assert (left.path, left.of) == (partial, model.name)
    assert removal.remove_leftover(left) == len(b"begun")
    assert (partial.exists(), model.exists()) == (False, True)
