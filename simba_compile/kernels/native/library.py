"""Finds the library of C kernels, and sees whether it was built from the sources that stand beside it.

No torch here: setup.py runs this file for `digest`.
"""

import ctypes
import hashlib
import importlib.util
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger("simba_compile")

SOURCES = Path(__file__).parent.parent / "cpu"
SLOWER = "plain torch runs in their place, many times slower"
REBUILD = "Reinstall simba_compile, or in a checkout of it run: python setup.py build_ext --inplace --force"


def digest(folder: Path) -> int:
    """A number of 64 bits for the names and contents of a folder's C files; 0 where there are none, as in a wheel."""
    files = sorted(folder.glob("*.[ch]"))
    contents = [(file.name, file.read_bytes()) for file in files]
    return int(hashlib.sha256(repr(contents).encode()).hexdigest()[:16], 16) if files else 0


def loaded_openmp() -> str | None:
    """Where the OpenMP runtime lies that torch has loaded, as Linux shows it."""
    maps = Path("/proc/self/maps")
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()] if maps.exists() else []
    runtimes = {line[-1] for line in lines if Path(line[-1]).name.startswith(("libgomp", "libomp", "libiomp5"))}
    torchs = [path for path in runtimes if Path(path).parent.match("torch/lib") or Path(path).parent.name == "torch.libs"]
    return min(torchs or runtimes, default=None)  # other packages bring runtimes of their own


def share_openmp() -> None:
    """Lets what is loaded next use the OpenMP runtime that torch has loaded, so that both share one pool of threads.

    torch's wheels for x86-64 load it for everyone, those for arm64 for torch alone. A second runtime would have threads of
    its own, which spin against the other's.
    """
    path = loaded_openmp()
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None (with one warning) where it was not built, cannot be loaded or is of other sources."""
    spec = importlib.util.find_spec("simba_compile.kernels._native")
    if spec is None or spec.origin is None:
        log.warning(
            "The native CPU kernels were not built (no C compiler at install time? or a checkout that pip has not "
            "installed with -e?): %s. Install a C compiler and reinstall simba_compile.",
            SLOWER,
        )
        return None
    try:
        share_openmp()
        lib = ctypes.CDLL(spec.origin)
        lib.simba_sources.restype = ctypes.c_uint64
        built_from, here = lib.simba_sources(), digest(SOURCES)
        lib.simba_set_level(-1)
    except (OSError, AttributeError) as error:  # no library, or another one
        log.warning("The native CPU kernels do not load (%s): %s. %s", error, SLOWER, REBUILD)
        return None
    if here not in (0, built_from):
        log.warning("The native CPU kernels are of other sources than those in %s: %s. %s", SOURCES, SLOWER, REBUILD)
        return None
    return lib
