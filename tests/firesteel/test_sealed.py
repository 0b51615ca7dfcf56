from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firesteel.sdk import StorageError, TransportError
from firesteel.sealed import MANIFEST, damage, new_folder, remove_folder, replace_file, storage_errors, sweep


def write(target: Path, **files: bytes) -> None:
    with new_folder(target, sum(map(len, files.values()))) as folder:
        for name, content in files.items():
            folder.write(name, [content])


def test_a_folder_is_whole_with_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a/b", one=b"1", two=b"")
    assert damage(tmp_path / "a/b", names=("one", "two")) is None
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"one", "two", MANIFEST}
    assert (tmp_path / "a/b/one").read_bytes() == b"1"


@given(content=st.binary(min_size=1, max_size=50), place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("sealed") / "a"
    write(folder, file=content)
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    (folder / "file").write_bytes(changed)
    assert "does not have the content" in str(damage(folder))


def test_a_manifest_that_leaves_a_file_out_does_not_hide_it(tmp_path: Path) -> None:
    write(tmp_path / "a", one=b"1")
    assert "does not list two" in str(damage(tmp_path / "a", names=("one", "two")))


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "/dev/zero", "..", "", "a/b", "inner/../../outside"]
)
def test_a_manifest_from_elsewhere_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    write(tmp_path / "a", one=b"1")
    listed = [{"name": name, "size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}]
    write_manifest(tmp_path / "a", listed)
    found = str(damage(tmp_path / "a"))
    assert "is not the name of a file in it" in found
    assert "bytes instead" not in found  # nor is anything told of what is there


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a", one=b"1")
    (tmp_path / "a/one").unlink()
    (tmp_path / "a/one").symlink_to("/dev/zero")
    assert "is not a file" in str(damage(tmp_path / "a"))
    (tmp_path / "a/one").unlink()
    os.mkfifo(tmp_path / "a/one")
    assert "is not a file" in str(damage(tmp_path / "a"))


def write_manifest(folder: Path, files: list[dict[str, object]]) -> None:
    """As anybody could write one: with the right hash of the list."""
    listed = json.dumps(files, indent=1, sort_keys=True).encode() + b"\n"
    content = {"files": files, "sha256": hashlib.sha256(listed).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(content))


def fail_in_between(target: Path) -> None:
    with new_folder(target, 1) as folder:
        folder.write("file", [b"x"])
        raise ZeroDivisionError


def test_what_fails_in_between_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_in_between(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a needs [\d,]+ bytes and its disk has [\d,]+ free"):
        write_much(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def write_much(target: Path) -> None:
    with new_folder(target, shutil.disk_usage(target.parent).total * 2):
        raise AssertionError("there is no room")


def test_a_disk_that_fills_up_in_between_is_told_with_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a was not written, 1 bytes: .*No space left.*; make room"):
        write(tmp_path / "a", one=b"1")
    assert list(tmp_path.iterdir()) == []


def test_to_make_room_is_no_advice_where_room_is_not_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"No such file or directory.*; name a folder that can be written to$"
    ):
        replace_file(tmp_path / "no such folder/a", b"1")


def test_a_name_is_not_taken_twice(tmp_path: Path) -> None:
    write(tmp_path / "a", one=b"1")
    with pytest.raises(StorageError, match="exists already"):
        write(tmp_path / "a", one=b"2")
    assert (tmp_path / "a/one").read_bytes() == b"1"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    replace_file(tmp_path / "list", b"one")
    replace_file(tmp_path / "list", b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("list", b"two")]


def test_leftovers_of_the_killed_are_swept_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "whole", one=b"1")
    (tmp_path / ".partial-a-1").mkdir()
    (tmp_path / ".partial-list-2").write_text("")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    remove_folder(tmp_path / "whole")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="the server is gone"), storage_errors(tmp_path / "a", 1):
        raise TransportError("the server is gone")  # a ConnectionError, so an OSError
