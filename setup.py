"""Builds the native CPU kernels; everything else stands in pyproject.toml."""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = Path("simba_compile/kernels/cpu")
DIGEST = runpy.run_path("simba_compile/kernels/native/library.py")["digest"](CPU)
COMPILE = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]


class BuildKernels(build_ext):
    """A plain shared library under the name of an extension: it is loaded with ctypes and knows nothing of Python."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """There is no ``PyInit`` function to export."""
        return []

    def build_extensions(self) -> None:
        """All sources at once: each level of instructions is half a minute of the compiler's."""
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **given: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_in_turn([source], **given), sources)
                return [path for paths in made for path in paths]

        if self.compiler.compiler_type == "unix":
            self.compiler.compile = compile_at_once
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """With OpenMP where the compiler has it; one thread is still many times faster than plain torch."""
        try:
            super().build_extension(ext)
        except CompileError as error:
            if "-fopenmp" not in ext.extra_compile_args:
                raise
            self.warn(f"compiling with -fopenmp failed ({error}): trying without, for a single thread")
            ext.extra_compile_args.remove("-fopenmp")
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "simba_compile.kernels._native",
            sources=[str(CPU / f"{name}.c") for name in ("level_base", "level_v3", "level_v4", "dispatch", "tokens")],
            depends=[str(header) for header in sorted(CPU.glob("*.h"))],
            define_macros=[("SIMBA_SOURCES", f"{DIGEST:#x}u")],  # library.py compares it
            # Not linked with OpenMP's runtime: its symbols come from the one that torch has loaded, so that both share
            # one pool of threads.
            extra_compile_args=COMPILE if sys.platform == "linux" else ["-O3", "-fno-math-errno"],
            extra_link_args=["-lm"] if sys.platform == "linux" else [],
            optional=True,
        )
    ],
)
