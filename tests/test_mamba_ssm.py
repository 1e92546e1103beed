"""mamba_ssm's own models, in a process of their own.

Where mamba_ssm can be imported, transformers takes its kernels, even on a CPU, and they need a GPU. So `make test` puts it
into a folder that only ``tests/with_mamba_ssm`` sees, beside a stub of its CUDA extension.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from own_process import assert_passes, with_path

FOLDER = Path(__file__).parent / "with_mamba_ssm"
INSTALLED = Path(sys.prefix) / "mamba_ssm"


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="mamba_ssm is not installed: `make test` does it")
def test_with_mamba_ssm() -> None:
    """Every test of the folder passes, and there is at least one."""
    assert_passes(FOLDER, with_path(INSTALLED, FOLDER) | {"SIMBA_WITH_MAMBA_SSM": "1"})
