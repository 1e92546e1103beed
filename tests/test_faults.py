"""What is missing or broken ends in a clear message and a working, slower path."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_ids, simba, tiny_model
from kernel_inputs import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from simba_compile import capture
from simba_compile.kernels import reference
from simba_compile.kernels.native import binding, library
from simba_compile.kernels.ops import dispatch

ROOT = Path(__file__).parents[1]


def put_library(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the native library stand in this place, or in none."""
    spec = None if path is None else importlib.machinery.ModuleSpec("_native", None, origin=str(path))
    find = importlib.util.find_spec
    ours = "simba_compile.kernels._native"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == ours else find(name, *rest))


def shared(path: Path, source: str) -> Path:
    """A shared library of this source."""
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    return path


BAD_LIBRARIES = ["missing", "empty", "corrupted", "without OpenMP's runtime", "another one", "older sources"]


@pytest.mark.parametrize("kind", BAD_LIBRARIES)
def test_a_library_that_cannot_be_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path: Path | None = tmp_path / "_native.so"
    assert path is not None
    if kind == "missing":
        path = None
    elif kind == "empty":
        path.touch()
    elif kind == "corrupted":
        path.write_bytes(b"\x7fELF" + bytes(range(256)) * 20)
    elif kind == "another one":
        shared(path, "int nothing_of_ours;")
    elif kind == "older sources":
        shared(path, "unsigned long simba_sources(void) { return 1; } int simba_set_level(int l) { return l; }")
    else:  # as torch without OpenMP would leave it
        shared(path, "void simba_no_such_runtime(void); void simba_sources(void) { simba_no_such_runtime(); }")
    with caplog.at_level(logging.WARNING, "simba_compile"):
        put_library(path, monkeypatch)
        assert binding.library.__wrapped__() is None
    (record,) = caplog.records
    assert "plain torch runs in their place" in record.message
    reasons = {"missing": "not built", "older sources": "of other sources"}
    assert reasons.get(kind, "do not load") in record.message
    assert ("Install a C compiler" if kind == "missing" else "setup.py build_ext --inplace --force") in record.message


LOADED_FOR_TORCH_ALONE = """
import ctypes, runpy, sys
openmp, native, library = sys.argv[1:]
ctypes.CDLL(openmp)
try:
    ctypes.CDLL(native)
except OSError as error:
    assert "undefined symbol: " in str(error)
else:
    raise AssertionError("it should need OpenMP's runtime")
runpy.run_path(library)["share_openmp"]()
ctypes.CDLL(native)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="only there the kernels are built for OpenMP")
def test_openmps_runtime_may_be_loaded_for_torch_alone() -> None:
    """As torch's wheels for arm64 load it; those for x86-64 load it for everyone, so here is a process without torch."""
    openmp = library.loaded_openmp()
    assert openmp is not None
    native = importlib.util.find_spec("simba_compile.kernels._native")
    assert native is not None and native.origin is not None
    command = [sys.executable, "-c", LOADED_FOR_TORCH_ALONE, openmp, native.origin, library.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_digest_sees_every_change(tmp_path: Path) -> None:
    """Another content, name or place of the same bytes, and a further file; not what is no source."""
    folder = tmp_path / "cpu"
    shutil.copytree(library.SOURCES, folder, ignore=shutil.ignore_patterns("tokens.c"))
    seen = [library.digest(library.SOURCES), library.digest(folder)]
    (folder / "simba.h").write_text((folder / "simba.h").read_text().replace("x, dt, B, C, z;", "dt, x, B, C, z;"))
    seen.append(library.digest(folder))
    (folder / "simba.h").rename(folder / "other.h")
    seen.append(library.digest(folder))
    (folder / "notes.txt").touch()
    assert library.digest(folder) == seen[-1]
    assert len(set(seen)) == len(seen) and 0 not in seen


def test_a_wheel_has_no_sources_to_compare_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library.digest(tmp_path) == 0
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    assert (library.library.__wrapped__() is None) == (binding.library() is None)


def test_without_native_kernels_models_run_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(layers=2)
    with torch.no_grad():
        expected = simba(model, keep=0.2, min_tokens=4)(random_ids(2, 40)).logits
        torch._dynamo.reset()
        with caplog.at_level(logging.WARNING, "simba_compile"):
            binding.library.cache_clear()
            try:
                put_library(None, monkeypatch)
                assert not binding.available()
                actual = simba(model, keep=0.2, min_tokens=4)(random_ids(2, 40)).logits
            finally:
                binding.library.cache_clear()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert len([record for record in caplog.records if "plain torch runs" in record.message]) == 1


def test_without_triton_the_definitions_run_on_a_gpu_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Device "meta" stands for the GPU, which is not there."""
    monkeypatch.setattr(dispatch, "GPU", "meta")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    dispatch._triton_kernels.cache_clear()
    try:
        for name in ("gather", "influence"):
            found = dispatch.implementation(name, torch.empty(2, 3, device="meta"))
            assert inspect.unwrap(found) is getattr(reference, name)
    finally:
        dispatch._triton_kernels.cache_clear()
    (record,) = caplog.records
    assert "triton is not installed" in record.message


@pytest.mark.parametrize(
    ("dtype", "device", "with_kernel"),
    [
        (torch.float16, "meta", {"gather", "influence"}),
        (torch.float64, "meta", {"gather"}),  # the others compute in float32
        (torch.float16, "cpu", set()),
    ],
)
def test_what_runs_on_a_gpu(dtype: torch.dtype, device: str, with_kernel: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {name: object() for name in ("gather", "influence")}
    monkeypatch.setattr(dispatch, "GPU", "meta")
    monkeypatch.setattr(dispatch, "_triton_kernels", lambda: kernels)
    x = torch.empty(2, 3, dtype=dtype, device=device)
    found = {name for name, kernel in kernels.items() if dispatch.implementation(name, x, None) is kernel}
    assert found == with_kernel
    on_two_devices = dispatch.implementation("gather", x, torch.empty(1, device="cpu"), torch.empty(1, device="meta"))
    assert inspect.unwrap(on_two_devices) is reference.gather


def test_tensors_of_two_gpus_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read one GPU's addresses on the other: an illegal access, after which nothing runs any more."""
    monkeypatch.setattr(dispatch, "_triton_kernels", lambda: {"gather": "the kernel"})
    with FakeTensorMode():
        one, same, other = (torch.empty(2, 3, device=f"cuda:{place}") for place in (0, 0, 1))
    assert dispatch.implementation("gather", one, same) == "the kernel"
    assert inspect.unwrap(dispatch.implementation("gather", one, other)) is reference.gather


def test_memory_that_a_kernel_does_not_get_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = types.SimpleNamespace(simba_select=lambda *args: binding.OUT_OF_MEMORY)
    monkeypatch.setattr(binding, "library", lambda: failing)
    with pytest.raises(MemoryError, match="simba::select could not allocate"):
        torch.ops.simba.select(torch.randn(1, 9, dtype=torch.float64), 3, 0, 1)


COMPILERS = {
    "none": "#!/bin/sh\nexit 1\n",
    "without OpenMP": '#!/bin/sh\ncase "$*" in *-fopenmp*) echo "cc: unsupported option -fopenmp" >&2; exit 1;; esac\n'
    'for last; do :; done\ncase "$*" in *-shared*) exec cc "$@";; esac\nexec cc -O0 "$@" -O0\n',
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_installing_without_a_compiler_or_openmp_succeeds(kind: str, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILERS[kind])
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    environment = {**os.environ, "CC": str(compiler)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    built = list((tmp_path / "lib").rglob("_native*"))
    if kind == "none":
        assert not built
        assert "building extension" in run.stderr and "failed" in run.stderr
        return
    assert "single thread" in run.stderr
    (path,) = built
    lib = ctypes.CDLL(str(path))
    assert lib.simba_set_level(-1) == lib.simba_set_level(99)  # an unknown level: the best there is


def test_an_unknown_cpu_level_is_the_best_there_is() -> None:
    lib = binding.library()
    if lib is None:
        pytest.skip("the native kernels were not built")
    best = lib.simba_set_level(-1)
    assert [lib.simba_set_level(level) for level in (99, 3, best)] == [best] * 3
    assert lib.simba_set_level(0) == 0
    assert lib.simba_set_level(-1) == best


READ_ONLY = """
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=32)).eval()
with torch.no_grad():
    out = torch.compile(model, backend="simba", options={"keep": 0.5, "min_tokens": 4})(torch.ones(2, 40, dtype=torch.int64))
print("finite", out.logits.isfinite().all().item())
"""


def test_caches_that_cannot_be_written() -> None:
    """Not even by root: nothing can be made under a device, or in /proc."""
    nowhere = {"HOME": "/dev/null", "TORCHINDUCTOR_CACHE_DIR": "/proc", "TRITON_CACHE_DIR": "/dev/null/triton"}
    nowhere |= {"XDG_CACHE_HOME": "/dev/null/cache", "HF_HOME": "/dev/null/hf"}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", READ_ONLY], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "finite True" in run.stdout


def test_another_transformers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A family whose file has other functions, and one that isn't there: the others are lifted, and these stay dense."""
    older = types.ModuleType("transformers.models.older.modeling_older")
    monkeypatch.setitem(sys.modules, older.__name__, older)
    functions = ("causal_conv1d_fn", "mamba_selective_scan")
    monkeypatch.setattr(capture, "FAMILIES", dict.fromkeys(("older", "no_such_family"), functions))
    monkeypatch.setattr(capture, "EXPERTS", ())
    monkeypatch.setattr(capture, "PACKAGES", {})
    with caplog.at_level(logging.INFO, "simba_compile"):
        capture.install(simba_backend())
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings and all("models that use it stay dense" in message for message in warnings)
    assert any("mamba_selective_scan" in message for message in warnings)
    assert any("no_such_family is not lifted" in record.message for record in caplog.records)


def test_a_broken_package(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """mamba_ssm without its CUDA extension, or with one of another torch: what is lifted of it is passed over."""
    broken = {f"broken_{error}": f"raise {error}('no extension')" for error in ("ImportError", "RuntimeError")}
    for name, code in broken.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(capture, "FAMILIES", {})
    monkeypatch.setattr(capture, "EXPERTS", ())
    monkeypatch.setattr(capture, "PACKAGES", {name: {} for name in broken})
    with caplog.at_level(logging.INFO, "simba_compile"):
        capture.install(simba_backend())
    assert [record.message for record in caplog.records] == [f"{name} is not lifted: no extension" for name in broken]


def simba_backend() -> Any:
    """The entry point."""
    from simba_compile.backend import simba as backend

    return backend
