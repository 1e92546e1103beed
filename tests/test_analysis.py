"""What `simba analyze` measures, on scans and models whose answer is known."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import random_ids, tiny_model
from eager_reference import contributions
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from simba_compile.analysis import flow, redundancy
from simba_compile.analysis.intervals import interval, paired
from simba_compile.analysis.variants import ScanRead, Variants, record_scans
from simba_compile.cli import app
from simba_compile.options import Options
from simba_compile.passes.scans import SCANS

CHANNELS, STATES = 6, 4


def scan(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor | None = None) -> ScanRead:
    """A scan with Δ = 1 and C = 1 over x, (batch, token, channel)."""
    batch, tokens = x.shape[:2]
    ones = torch.ones(batch, tokens, A.shape[1])
    arguments = {"x": x, "dt": torch.ones_like(x), "A": A, "B": ones if B is None else B, "C": ones}
    arguments |= {"D": None, "z": None, "dt_bias": None, "softplus": False, "index": None}
    return ScanRead(SCANS[torch.ops.simba.selective_scan], arguments, torch.arange(tokens).expand(batch, tokens))


# --- flow ------------------------------------------------------------------------------------------------------------


def test_without_decay_equal_tokens_have_a_flat_curve() -> None:
    tokens = 40
    found = flow.normalised_influence(scan(torch.ones(2, tokens, CHANNELS), torch.zeros(CHANNELS, STATES)), Options())
    # Every token adds STATES to each channel of y_T, so ‖y_T‖ is tokens · STATES · √CHANNELS.
    assert torch.allclose(found, torch.full_like(found, 1 / (tokens * CHANNELS**0.5)))
    points = flow.curve(found, torch.arange(tokens).expand(2, tokens), tokens, 8)
    assert points == pytest.approx([points[0]] * 8)
    assert flow.reach(points) == pytest.approx(1)


def test_decay_is_what_the_curve_shows() -> None:
    tokens, rate = 32, 0.25
    A = torch.full((CHANNELS, STATES), -rate)
    found = flow.normalised_influence(scan(torch.ones(1, tokens, CHANNELS), A), Options())
    falls = found[0, :-1] / found[0, 1:]
    assert torch.allclose(falls, torch.full_like(falls, -rate).exp(), rtol=1e-5)


def test_flow_is_the_influence_over_the_size_of_the_output() -> None:
    torch.manual_seed(0)
    read = scan(torch.randn(2, 30, CHANNELS), -torch.rand(CHANNELS, STATES), torch.randn(2, 30, STATES))
    given_ = read.arguments
    parts = contributions(given_["x"], given_["dt"], given_["A"], given_["B"], given_["C"][:, -1]).double()
    y = parts.sum(1).norm(dim=1, keepdim=True)
    for pool, pooled in (("absmax", parts.abs().amax(-1)), ("l2", parts.norm(dim=-1))):
        found = flow.normalised_influence(read, Options(pool=pool))
        assert torch.allclose(found, pooled / y, rtol=1e-4)


def test_a_planted_token_is_the_peak() -> None:
    x = torch.full((1, 64, CHANNELS), 0.01)
    x[0, 20] = 5.0
    found = flow.normalised_influence(scan(x, torch.full((CHANNELS, STATES), -0.01)), Options())
    assert found.argmax().item() == 20
    points = flow.curve(found, torch.arange(64)[None], 64, 16)
    assert max(range(16), key=lambda i: points[i]) == 20 * 16 // 64


def test_parts_without_tokens_are_left_out() -> None:
    flowing, positions = torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[0, 1, 7]])
    points = flow.curve(flowing, positions, 8, 4)
    assert points == [2.0, None, None, 8.0]
    assert flow.reach(points) == pytest.approx(0.25)
    assert flow.reach([None, None, 1.0, 1.0]) is None


def test_flow_of_a_model() -> None:
    model, ids = tiny_model("mamba", layers=3), random_ids(2, 60)
    [first, last] = flow.measure(model, ids, Options(keep=0.2, min_tokens=4), [1, 3], 6)
    assert (first["layer"], first["tokens"]) == (1, 60)
    assert first["pruned"] == pytest.approx(first["dense"], rel=1e-5)  # nothing left yet
    assert (last["layer"], last["tokens"]) == (3, 12)
    # The token at the end has no decay behind it and always stays: in the dense model it is the same token.
    assert last["dense_same_tokens"][-1] is not None
    with pytest.raises(ValueError, match="mixers 1 to 3"):
        flow.measure(model, ids, Options(), [4], 6)


# --- recorded scans --------------------------------------------------------------------------------------------------


def test_recorded_tokens_are_those_that_stay() -> None:
    from eager_reference import pruned_forward

    model, ids = tiny_model("mamba", layers=3), random_ids(2, 50)
    options = {"keep": 0.3, "min_tokens": 4}
    scans, _ = record_scans(model, ids, Options(**options), logits_to_keep=1)
    expected = pruned_forward(model, ids, logits_to_keep=1, **options)
    for read, kept in zip(scans, expected.kept, strict=True):
        assert torch.equal(read.positions, kept)
        assert read.arguments["x"].shape[1] == kept.shape[1]
    with pytest.raises(ValueError, match="'scan' only"):
        record_scans(model, ids, Options(placement="layer"))


def test_a_model_without_scans_is_told() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    with pytest.raises(ValueError, match="no scan"):
        record_scans(model, random_ids(2, 20), Options(keep=1.0))


# --- redundancy ------------------------------------------------------------------------------------------------------


def test_equal_states_have_similarity_one() -> None:
    x = torch.zeros(2, 32, CHANNELS)
    x[0, 0, 0], x[1, 0, 1] = 1.0, 1.0  # nothing decays and nothing more comes; the two windows have nothing in common
    found = redundancy.state_similarity(scan(x, torch.zeros(CHANNELS, STATES)))
    assert found.adjacent == pytest.approx(1, abs=1e-5)
    assert found.unrelated == pytest.approx(0, abs=1e-5)


def test_states_that_forget_at_once_are_as_alike_as_their_tokens() -> None:
    x = torch.zeros(2, 32, CHANNELS)
    x[:, 0::2, 0], x[:, 1::2, 1] = 1.0, 1.0  # each token is orthogonal to the one before
    found = redundancy.state_similarity(scan(x, torch.full((CHANNELS, STATES), -50.0)))
    assert found.adjacent == pytest.approx(0, abs=1e-5)
    assert found.unrelated == pytest.approx(1, abs=1e-5)


def test_similarity_of_vectors() -> None:
    values = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 2.0]]])
    found = redundancy.similarity(values)
    assert found.adjacent == pytest.approx((0.5**0.5 + 1) / 2)
    assert found.unrelated == pytest.approx(0.5**0.5)


def test_redundancy_of_a_model_is_that_of_its_own_hidden_states() -> None:
    model, ids = tiny_model("mamba", layers=2), random_ids(2, 40)
    found = redundancy.measure(model, ids)
    with torch.no_grad():
        streams = model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    for layer, stream in zip(found["hidden_states"], streams, strict=True):
        assert layer == pytest.approx(dataclasses.asdict(redundancy.similarity(stream)), abs=1e-4)
    assert len(found["ssm_states"]) == 2


def test_mamba2_with_one_channel_a_head_is_mamba1() -> None:
    """Where every head has one channel and a group of its own, and A is the same for all states, the two scans are one."""
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, 24, CHANNELS), torch.rand(2, 24, CHANNELS), -torch.rand(CHANNELS)
    B, C = torch.randn(2, 24, STATES), torch.randn(2, 24, STATES)
    positions = torch.arange(24).expand(2, 24)
    rest = {"D": None, "z": None, "dt_bias": None, "softplus": True, "index": None}
    one = {"x": x, "dt": dt, "A": A[:, None].expand(CHANNELS, STATES), "B": B, "C": C, **rest}
    limits = {"dt_min": 0.0, "dt_max": float("inf"), "initial": None}
    two = {"x": x[..., None], "dt": dt, "A": A, "B": B[:, :, None], "C": C[:, :, None], **rest, **limits}
    scans = [
        ScanRead(SCANS[torch.ops.simba.selective_scan], one, positions),
        ScanRead(SCANS[torch.ops.simba.ssd_scan], two, positions),
    ]
    for pool in ("max", "l2"):
        first, second = (flow.normalised_influence(scan, Options(pool=pool)) for scan in scans)
        assert torch.allclose(first, second, rtol=1e-4)
    first, second = (dataclasses.asdict(redundancy.state_similarity(scan)) for scan in scans)
    assert first == pytest.approx(second, abs=1e-5)


# --- one trace, many options -----------------------------------------------------------------------------------------


def test_variants_give_what_a_compilation_of_their_own_gives() -> None:
    model, ids = tiny_model("mamba", layers=3), random_ids(3, 48)
    variants = Variants(model)
    settings = [Options(keep=1.0), Options(keep=0.3, min_tokens=4)]
    found = {options: torch.cat(list(variants.logits(options, ids, 3))) for options in (*settings, settings[1])}
    for options in settings:
        torch._dynamo.reset()
        alone = torch.compile(model, backend="simba", options=dataclasses.asdict(options))
        with torch.no_grad():
            expected = alone(ids, use_cache=False, logits_to_keep=3).logits
        assert torch.allclose(found[options], expected, atol=1e-5)
    assert not torch.allclose(found[settings[0]], found[settings[1]], atol=1e-3)


def test_the_share_of_a_plan_is_the_one_that_runs() -> None:
    variants = Variants(tiny_model("mamba", layers=3))
    with pytest.raises(RuntimeError, match="nothing"):
        variants.flops(64)
    with pytest.raises(RuntimeError, match="nothing that prunes"):
        variants.share(Options(), 64)
    for schedule in ("linear", (0.9, 0.5, 0.2)):
        options = Options(keep=0.2, min_tokens=4, schedule=schedule)
        for _ in variants.logits(options, random_ids(2, 64), 1):
            pass
        dense, pruned = variants.flops(64)
        assert variants.share(options, 64) == pruned / dense < 1
    assert variants.share(Options(keep=1.0), 64) == 1


# --- intervals -------------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    # Wilson's interval of 8 of 10, from R: prop.test(8, 10, correct = FALSE).
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert interval([1] * 20)[0] == pytest.approx(0.8388747, abs=1e-6)
    # Five numbers of mean 3 and standard deviation √2.5.
    assert interval([1.5, 2, 3, 4, 4.5]) == pytest.approx((3 - 1.96 * 0.5700877, 3 + 1.96 * 0.5700877), abs=1e-4)
    assert paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == pytest.approx((0.5, 0.5, 0.5))
    # One number says nothing of how much they vary; one answer that is right or wrong does.
    assert interval([3.0]) == (-math.inf, math.inf) and paired([3.0], [1.0]) == (2.0, -math.inf, math.inf)
    assert interval([1])[1] == pytest.approx(1.0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=50))
def test_an_interval_holds_the_mean(values: list[float]) -> None:
    low, high = interval(values)
    assert low - 1e-9 <= sum(values) / len(values) <= high + 1e-9


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis") / "tiny"
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, state_size=4)).save_pretrained(folder)
    (folder / "text.txt").write_bytes(bytes(range(1, 250)) * 3)
    return folder


@pytest.mark.parametrize("command", ["redundancy", "flow"])
def test_analyze(command: str, bytes_model: Path, tmp_path: Path) -> None:
    data, picture = tmp_path / "a" / "data.json", tmp_path / "b" / "picture.png"
    arguments = ["analyze", command, "--model", bytes_model, "--text", bytes_model / "text.txt", "--length", "100"]
    arguments += ["--windows", "2", "--data", data, "--plot", picture]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(data.read_text())
    assert found["windows"] == [2, 100]
    assert len(found["layers"] if command == "flow" else found["ssm_states"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_analyze_says_what_is_wrong(bytes_model: Path, tmp_path: Path) -> None:
    def told(*arguments: object) -> str:
        result = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 2
        return " ".join(result.output.replace("│", " ").split())

    common = ("--model", bytes_model, "--data", tmp_path / "data.json")
    assert "too few" in told("analyze", "redundancy", *common, "--text", bytes_model / "text.txt", "--length", 5000)
    assert "No such file" in told("analyze", "flow", *common, "--text", tmp_path / "none")
    short = ("--text", bytes_model / "text.txt", "--length", 100)
    assert "at least 2 of 8" in told("analyze", "redundancy", *common, "--text", bytes_model / "text.txt", "--length", 7)
    (tmp_path / "one window").write_bytes(b"x" * 101)
    assert "1 window(s)" in told("analyze", "redundancy", *common, "--text", tmp_path / "one window", "--length", 100)
    assert "mixers 1 to 2" in told("analyze", "flow", *common, *short, "--layers", "3")
    assert "above 0" in told("analyze", "flow", *common, *short, "--keep", "0")
