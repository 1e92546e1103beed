"""The corpus of the byte-level testbed: the Python standard library's own source, with some files held out.

An epoch of training is every library module of the running interpreter, and half of its test suites, the other half in
the next one: they are twice the size of the library, and of another style. Left out are generated tables (``encodings``,
``pydoc_data``, ``_sysconfigdata*``), what is `HELD_OUT` with its tests, and the files that `is_drawn`, one in fifty. So two
sets of files are held out: modules that were picked because nothing like them is in the training part, which are hard, and
a random sample of the library and its test suites, which says what such files take on average. Files are joined by a
separator byte that occurs in none of them.

    python training/corpus.py > build/held-out.txt     # the held-out part, joined in the same way
"""

import argparse
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterable
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

TESTS_OF_HELD_OUT = (
    *("test_argparse.", "test_streams.", "test_base64.", "test_calendar.", "test_configparser.", "test_fractions."),
    *("test_ftplib.", "test_graphlib.", "test_heapq.", "test_htmlparser.", "test_json/", "test_plistlib."),
    *("test_selectors.", "test_shlex.", "test_statistics.", "test_tempfile.", "test_textwrap."),
)
"""What is in the paths of their tests, which quote them."""

TESTS = ("test", "tests", "idle_test")
GENERATED = ("encodings", "pydoc_data")
OTHERS = ("site-packages", "dist-packages", "lib2to3", "__pycache__")
EXCLUDED_FOLDERS = frozenset(GENERATED + OTHERS)
EXCLUDED_PREFIXES = ("_sysconfigdata",)


def library_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_drawn(name: str) -> bool:
    """Whether a file is of the random sample: the same one on every machine, whatever else is there."""
    return zlib.crc32(name.encode()) % 50 == 0


def files() -> tuple[list[str], list[str]]:
    """List what is neither generated nor `HELD_OUT`, nor tests of that.

    Returns
    -------
    tuple of list of str
        Library modules, and test suites: paths relative to `library_root`, with forward slashes, sorted.
    """
    root = library_root()
    modules, tests = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if name in HELD_OUT or EXCLUDED_FOLDERS.intersection(relative.parts) or relative.name.startswith(EXCLUDED_PREFIXES):
            continue
        if not any(part in TESTS for part in relative.parts):
            modules.append(name)
        elif not any(part in name for part in TESTS_OF_HELD_OUT):
            tests.append(name)
    return modules, tests


def _document(name: str) -> bytes:
    """Read one file of the library, without any separator byte of its own."""
    return (library_root() / name).read_bytes().replace(b"\r\n", b"\n").replace(bytes([SEPARATOR]), b"")


def training_files(epoch: int = 0) -> list[str]:
    """List the training files of an epoch: all modules, and every other test suite."""
    modules, tests = ([name for name in names if not is_drawn(name)] for names in files())
    return modules + tests[epoch % 2 :: 2]


def training_bytes(epoch: int = 0, seed: int = 0) -> bytes:
    """Join the training files of an epoch, in an order of its own.

    Returns
    -------
    bytes
        All documents, each preceded by the separator byte.
    """
    names = training_files(epoch)
    random.Random(seed + epoch).shuffle(names)
    separator = bytes([SEPARATOR])
    return b"".join(separator + _document(name) for name in names if (library_root() / name).stat().st_size)


def held_out_files() -> dict[str, bytes]:
    """Read the held-out modules.

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


def drawn_files() -> dict[str, bytes]:
    """Read the random sample, content by path: modules, then tests."""
    modules, tests = files()
    return {name: _document(name) for name in (*modules, *tests) if is_drawn(name)}


def windows_of(texts: Iterable[bytes], length: int, whole: bool = False) -> list[bytes]:
    """Cut each text into windows that do not overlap.

    Parameters
    ----------
    texts : iterable of bytes
        `held_out_files`, say.
    length : int
        Length of a window, in bytes.
    whole : bool
        Leave out each text's last window if it is shorter. Otherwise it is kept if it has at least two bytes.

    Returns
    -------
    list of bytes
        The windows, in the order of the texts.
    """
    windows = []
    for text in texts:
        windows += [text[start : start + length] for start in range(0, len(text), length)]
    return [window for window in windows if len(window) >= (length if whole else 2)]


if __name__ == "__main__":
    argparse.ArgumentParser(description="Print the held-out part of the corpus.").parse_args()
    separator = bytes([SEPARATOR])
    sys.stdout.buffer.write(b"".join(separator + text for text in held_out_files().values()))
