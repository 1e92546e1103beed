"""Run tests in a process of their own, for what is chosen once for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def with_path(*folders: Path) -> dict[str, str]:
    """The environment in which these folders come before all others that Python imports from."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}


def assert_passes(tests: Path, environment: dict[str, str], *chosen: str) -> None:
    """With this added to the environment every (chosen) test of the file or folder passes, and there is at least one."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests), *chosen]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout
