"""A test that does not run is a failure where FIRESTEEL_NO_SKIPS is set: shown by running pytest for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "a whole file": "import pytest\npytest.importorskip('no_such_package')\ndef test_a(): pass\n",
    "a test": "import pytest\ndef test_a(): pytest.skip('not today')\n",
    "a marked test": "import pytest\n@pytest.mark.skip(reason='not today')\ndef test_a(): pass\n",
    "for lack of a GPU": "import pytest\ndef test_a(): pytest.skip('needs CUDA')\n",
}


@pytest.mark.parametrize(
    ("skips", "allowed", "status"),
    [
        ("a whole file", False, pytest.ExitCode.TESTS_FAILED),
        ("a test", False, pytest.ExitCode.TESTS_FAILED),
        ("a marked test", False, pytest.ExitCode.TESTS_FAILED),
        ("for lack of a GPU", False, pytest.ExitCode.OK),
        ("a whole file", True, pytest.ExitCode.NO_TESTS_COLLECTED),
        ("a test", True, pytest.ExitCode.OK),
    ],
)
def test_a_skip_fails_the_run_where_none_may_be(
    tmp_path: Path, skips: str, allowed: bool, status: pytest.ExitCode
) -> None:
    shutil.copyfile(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(FILES[skips])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "FIRESTEEL_NO_SKIPS": "" if allowed else "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert ("skipped, and must not be:" in ran.stdout) == (status is pytest.ExitCode.TESTS_FAILED)
