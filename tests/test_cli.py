"""The command ``simba``, with models of a few thousand weights."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner, Result

import simba_compile
from simba_compile.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=None)
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_bytes(b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i, i) for i in range(40)))
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal wide enough that no message is broken in two."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")


def simba(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """What a person is told, on one line; no traceback."""
    result = simba(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.output.replace("│", " ").split())


def test_help_names_the_commands() -> None:
    result = simba("--help")
    assert result.exit_code == 0
    for command in ("demo", "bench", "explain"):
        assert command in result.output


def test_version() -> None:
    assert simba("--version").output.strip() == importlib.metadata.version("simba_compile") == simba_compile.__version__


def test_help_says_what_is_taken_where_nothing_is_given() -> None:
    for command, default in {
        ("demo",): "held out of training",
        ("bench",): "cuda where torch sees a GPU, else cpu",
        ("families",): "[default: (all)]",
        ("analyze", "flow"): "[default: (all)]",
    }.items():
        assert default in " ".join(simba(*command, "--help").output.split()), command


def test_help_does_not_load_torch() -> None:
    loaded = "import sys, simba_compile.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


def test_demo(model: Path, text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "demo.png"
    result = simba("demo", "--model", model, "--file", text, "--tokens", 256, "--no-large", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "256 bytes of text.py" in result.output
    assert result.output.count("256 128") == 3  # keep 0.3 and 0.1 cannot go below what is protected
    for shown in ("HF eager", "dense (keep 1.0)", "keep 0.5", "keep 0.3", "keep 0.1", "bits per byte"):
        assert shown in result.output
    assert "keep 0.1 goes on" in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_demo_explains_what_is_missing(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "models/python-bytes" in refused("demo", "--model", tmp_path / "none", "--file", text)
    assert "none.py cannot be read: No such file" in refused("demo", "--model", model, "--file", tmp_path / "none.py")
    (tmp_path / "empty.py").write_bytes(b"")
    assert "0 bytes" in refused("demo", "--model", model, "--file", tmp_path / "empty.py")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = refused("demo", "--model", model, "--file", text, "--plot", tmp_path / "x.png")
    assert "simba_compile[plot]" in told


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "--plot"),
        ("bench", "--out"),
        ("families", "--out"),
        ("eval", "--model", "x", "--plot"),
        ("analyze", "redundancy", "--model", "x", "--text", __file__, "--data"),
        ("analyze", "flow", "--model", "x", "--text", __file__, "--plot"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_written_is_told_before_the_work(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "place.png"
    assert f"'{command[-1]}': {place}" in (told := refused(*command, place)) and "cannot be written" in told


def test_where_results_go_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    """Until there are some; a folder is made for them."""
    made, kept = tmp_path / "new" / "data.json", tmp_path / "kept.png"
    kept.write_text("kept")
    command = ("analyze", "redundancy", "--model", model, "--text", tmp_path / "missing", "--data", made, "--plot", kept)
    assert "--text" in refused(*command)
    assert made.parent.is_dir() and not made.exists() and kept.read_text() == "kept"


def test_demo_wants_bytes(text: Path, tmp_path: Path) -> None:
    MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert "vocabulary of 300" in refused("demo", "--model", tmp_path, "--file", text)


def test_the_scored_bytes_are_the_last(tmp_path: Path) -> None:
    from simba_compile.cli.demo import _bits_per_byte, read

    (tmp_path / "digits").write_bytes(bytes(range(100, 200)))
    window = read(tmp_path / "digits", 64)
    assert len(window.context) == 64
    assert window.scored == 32
    assert window.context + window.after == bytes(range(window.context[0], 200))[: 64 + len(window.after)]
    sure = torch.full((1, 32, 256), -100.0)  # certain of the byte that follows each of the last 32
    for place, byte in enumerate(window.context[-32:]):
        sure[0, place, byte + 1] = 100.0
    assert _bits_per_byte(sure, window) == pytest.approx(0.0)


def test_the_demos_second_part(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large model, here a small one; no plot."""
    from simba_compile.cli import models

    demo = importlib.import_module("simba_compile.cli.demo")  # the package has the command under this name
    monkeypatch.setattr(models, "MAMBA_130M", {"hidden_size": 16, "state_size": 4, "vocab_size": 50})
    monkeypatch.setattr(demo, "LARGE_LAYERS", 2)
    result = simba("demo", "--model", model, "--file", text, "--tokens", 64)
    assert result.exit_code == 0, result.output
    assert "(2 layers, hidden 16, random weights) on a prompt of 768 tokens" in result.output
    assert result.output.count("HF eager") >= 2


def test_the_demo_reads_python_itself_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = importlib.import_module("simba_compile.cli.demo")
    assert demo.read(None, 64).name == demo.FILES[0]
    monkeypatch.setattr(demo, "FILES", ("no_such.py",))
    with pytest.raises(typer.BadParameter, match=r"has none of no_such\.py: name one"):
        demo.read(None, 64)


def test_a_system_that_does_not_name_its_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from simba_compile.cli import machine

    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "some64")
    assert machine.cpu_name() == "some64"


@pytest.mark.parametrize(
    ("has", "named"), [({}, "AVX2"), ({"avx512_bf16": True, "amx_bf16": True}, "AVX2, AVX512_BF16, AMX")]
)
def test_what_figures_in_bfloat16_depend_on_is_named(monkeypatch: pytest.MonkeyPatch, has: dict, named: str) -> None:
    from simba_compile.cli import machine

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert machine.instructions() == named


def test_targets_are_met_or_missed_on_either_side() -> None:
    from simba_compile.cli.bench_report import BARE, DENSE, EAGER, INDUCTOR, PRUNED, targets

    seconds = {EAGER: 8.0, INDUCTOR: 4.0, DENSE: 1.6, PRUNED: 1.0, BARE: 0.8}
    prefill = {name: {"median": median, "compile": 10 * median} for name, median in seconds.items()}
    decode = {PRUNED: {"median": 2.0}, INDUCTOR: {"median": 1.0}}
    memory = {EAGER: {"growth_mib": 100}, DENSE: {"growth_mib": 50}, PRUNED: {"growth_mib": 60}}
    results = {"prefill": prefill, "decode": decode, "memory": memory, "scoring": {"share": 0.09}}
    found = {target["what"]: (target["value"], target["met"]) for target in targets(results)}
    assert found == {
        "speedup over HF eager": (8.0, True),
        "speedup over HF Inductor": (4.0, False),
        "compile time / Inductor's": (0.25, True),
        "speedup over simba keep 1.0": (1.6, True),
        "time / its matrix products alone": (1.25, True),
        "score, selection and gathers / time": (0.09, False),
        "one decoding step / Inductor's": (2.0, False),
        f"growth of the memory / that of {EAGER}": (0.6, True),
        f"growth of the memory / that of {DENSE}": (1.2, False),
    }
    del prefill[INDUCTOR], decode[INDUCTOR]
    assert not any("Inductor" in target["what"] for target in targets(results))


def test_the_others_go_on_where_inductor_cannot() -> None:
    from simba_compile.cli.bench import first_call
    from simba_compile.cli.bench_report import EAGER, INDUCTOR

    def broken() -> None:
        raise RuntimeError("no compiler\nand more")

    calls, first, failed = {INDUCTOR: broken, EAGER: broken}, {}, {}
    first_call(INDUCTOR, calls, first, failed)
    assert failed == {INDUCTOR: "RuntimeError: no compiler"} and list(calls) == [EAGER] and not first
    with pytest.raises(RuntimeError, match="no compiler"):
        first_call(EAGER, calls, first, failed)


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setattr(sys, "argv", ["/bin/simba", "bench", "--quick"])
    result = simba("bench", "--quick", "--skip-inductor", "--out", tmp_path / "results")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert set(data["prefill"]) == {"HF eager", "simba keep 1.0", "simba keep 0.1", "matrix products"}
    assert set(data["decode"]) == {"HF eager", "simba keep 0.1"}
    assert set(data["memory"]) == {"HF eager", "simba keep 1.0", "simba keep 0.1"}
    for timing in (*data["prefill"].values(), *data["decode"].values()):
        assert 0 < timing["min"] <= timing["median"] <= timing["max"]
        assert len(timing["runs"]) == data["settings"]["repeats"]
    assert 0 < data["scoring"]["share"] < 1
    assert data["scoring"]["influence"] > 0
    page = (tmp_path / "results" / "bench.md").read_text()
    assert "MALLOC_MMAP_MAX_=0 " in data["command"] and data["command"].endswith(" simba bench --quick")
    for shown in (data["machine"]["cpu"], "speedup over HF eager", "speedup over simba keep 1.0"):
        assert shown in page
    assert "speedup over HF eager" in result.output


def test_a_quick_bench_writes_over_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    bench = importlib.import_module("simba_compile.cli.bench")  # the package has the command under this name
    monkeypatch.setattr(bench, "run", lambda settings, out, command: folders.append(out))
    for given in ((), ("--quick",), ("--quick", "--out", "elsewhere")):
        assert simba("bench", "--device", "cpu", *given).exit_code == 0
    assert folders == [Path("benchmarks/results"), Path("build/benchmarks"), Path("elsewhere")]


def test_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simba_compile.cli import bench_families

    small = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 8, "num_heads": 8, "vocab_size": 64}
    monkeypatch.setitem(bench_families.MODELS, "mamba2-130m", ("Mamba2", small))
    monkeypatch.setitem(bench_families.MODELS, "falcon_mamba", ("FalconMamba", {**small, "expand": 2}))
    for name in ("falcon_mamba", "mamba2-130m"):  # the second run keeps what the first has measured
        result = simba("families", "--only", name, "--tokens", 100, "--skip-inductor", "--out", tmp_path)
        assert result.exit_code == 0, result.output
    models = json.loads((tmp_path / "families.json").read_text())["models"]
    assert [*models] == ["mamba2-130m", "falcon_mamba"]
    data = models["mamba2-130m"]
    assert (data["mixers"], data["pruning"], data["dense because"]) == (2, 1, [])
    assert {*data["step"]} == {"HF eager", "simba keep 0.1"} and data["failed"] == {}
    page = (tmp_path / "families.md").read_text()
    assert "over keep 1.0" in page and "One decoding step" in page.split("falcon_mamba", 1)[1]
    assert "another length" in refused("families", "--only", "falcon_mamba", "--tokens", 200, "--out", tmp_path)
    assert json.loads((tmp_path / "families.json").read_text())["models"] == models
    assert "mamba2-130m, bamba-150m" in refused("families", "--only", "mamba9")


def test_turns_spread_the_runs_of_the_slow() -> None:
    from simba_compile.cli.timing import side_by_side

    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("fast", "slow")}
    timings = side_by_side(calls, {"fast": 4, "slow": 2})
    assert order == ["fast", "fast", "slow", "fast", "fast", "slow"]
    assert [len(timing.runs) for timing in timings.values()] == [4, 2]


def test_explain(model: Path) -> None:
    for extra in ((), ("--config-only",)):
        result = simba("explain", model, "--keep", 0.25, "--tokens", 200, *extra)
        assert result.exit_code == 0, result.output
        assert "layers.1.mixer" in result.output
        assert "50" in result.output  # a quarter of 200 tokens
    result = simba("explain", model, "--tokens", 200, "--schedule", " .5, 0.4", "--protect-last", 90)
    assert "100" in result.output and "90" in result.output and "80" not in result.output
    assert "as above" in simba("explain", model, "--tokens", 200, "--min-tokens", 200).output


def test_explain_says_what_is_wrong(model: Path, tmp_path: Path) -> None:
    assert "cannot be loaded" in refused("explain", tmp_path / "none")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "cannot be loaded" in refused("explain", tmp_path)
    assert "above 0 and at most 1" in refused("explain", model, "--keep", 2)
    assert "'0.5,x' is no list of numbers" in refused("explain", model, "--schedule", "0.5,x")
    assert "lists 3 shares and the model has 2 mixers" in refused("explain", model, "--schedule", "0.5,0.4,0.3")
    assert "did you mean 'linear'" in refused("explain", model, "--schedule", "linaer")
