"""The Triton kernels in processes of their own: under Triton's interpreter, and compiled by the oldest Triton.

Both are chosen when triton is imported, and for the whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from own_process import assert_passes, with_path

TESTS = Path(__file__).parent
OLDEST = Path(sys.prefix) / "triton_oldest"  # what torch 2.11 brings


@pytest.mark.parametrize("file", sorted((TESTS / "interpreted").glob("test_*.py")), ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    """Every test of the file passes, and there is at least one."""
    assert_passes(file, {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(not OLDEST.is_dir(), reason="the oldest Triton is not installed: `make test` does it")
def test_oldest_triton() -> None:
    """It lays out tiles by rules of its own, and yet compiles every kernel without a spill and with loops as short.

    For the two newest of NVIDIA's servers, to save time: docs/versions.md says when all targets were compiled.
    """
    environment = with_path(OLDEST)
    show = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(show, env=os.environ | environment, capture_output=True, text=True).stdout == "3.6.0\n"
    assert_passes(TESTS / "test_triton_targets.py", environment, "-k", "not sm_80 and not sm_120 and not gfx942")
