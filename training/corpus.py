"""The corpus of the byte-level testbed: the Python standard library's own source, with some files held out.

The training part is every library module of the running interpreter. Left out are test suites (three times the size of
the library, and of another style), generated tables (``encodings``, ``pydoc_data``, ``_sysconfigdata*``) and the
held-out files. Files are joined by a separator byte that occurs in none of them.

    python training/corpus.py > build/held-out.txt     # the held-out part, joined in the same way
"""

import random
import sys
import sysconfig
from pathlib import Path

SEPARATOR = 0
"""The byte between two documents; Python source cannot contain it."""

HELD_OUT = (
    "argparse.py",
    "asyncio/streams.py",
    "base64.py",
    "calendar.py",
    "configparser.py",
    "fractions.py",
    "ftplib.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "plistlib.py",
    "selectors.py",
    "shlex.py",
    "statistics.py",
    "tempfile.py",
    "textwrap.py",
)
"""Modules kept out of the training part: ordinary, varied, in Python 3.10 to 3.13, with no near twin elsewhere."""

TESTS = ("test", "tests", "idle_test")
GENERATED = ("encodings", "pydoc_data")
OTHERS = ("site-packages", "dist-packages", "lib2to3", "__pycache__")
EXCLUDED_FOLDERS = frozenset(TESTS + GENERATED + OTHERS)
EXCLUDED_PREFIXES = ("_sysconfigdata",)


def library_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def training_files() -> list[str]:
    """List the training files.

    Returns
    -------
    list of str
        Paths relative to `library_root`, with forward slashes, sorted.
    """
    root = library_root()
    names = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith(EXCLUDED_PREFIXES):
            names.append(name)
    return sorted(set(names) - set(HELD_OUT))


def _document(name: str) -> bytes:
    """Read one file of the library, without any separator byte of its own."""
    return (library_root() / name).read_bytes().replace(b"\r\n", b"\n").replace(bytes([SEPARATOR]), b"")


def training_bytes(seed: int | None = None) -> bytes:
    """Join the training files.

    Parameters
    ----------
    seed : int, optional
        Shuffles the order of the files. Without it they are in sorted order.

    Returns
    -------
    bytes
        All documents, each preceded by the separator byte.
    """
    names = training_files()
    if seed is not None:
        random.Random(seed).shuffle(names)
    separator = bytes([SEPARATOR])
    return b"".join(separator + _document(name) for name in names if (library_root() / name).stat().st_size)


def held_out_files() -> dict[str, bytes]:
    """Read the held-out files.

    Returns
    -------
    dict of str to bytes
        Content by path, in the order of `HELD_OUT`.

    Raises
    ------
    FileNotFoundError
        If this interpreter's library lacks one of them.
    """
    return {name: _document(name) for name in HELD_OUT}


def held_out_windows(length: int, whole: bool = False) -> list[bytes]:
    """Cut each held-out file into windows that do not overlap.

    Parameters
    ----------
    length : int
        Length of a window, in bytes.
    whole : bool
        Leave out each file's last window if it is shorter. Otherwise it is kept if it has at least two bytes.

    Returns
    -------
    list of bytes
        The windows, in the order of the files.
    """
    windows = []
    for text in held_out_files().values():
        windows += [text[start : start + length] for start in range(0, len(text), length)]
    return [window for window in windows if len(window) >= (length if whole else 2)]


if __name__ == "__main__":
    separator = bytes([SEPARATOR])
    sys.stdout.buffer.write(b"".join(separator + text for text in held_out_files().values()))
