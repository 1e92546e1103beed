"""What `benchmarks/` measures with: another paper's token reduction, the clock of stages, and the command at tiny sizes."""

import json
from pathlib import Path
from typing import Any

import growth
import measure
import page
import pytest
import quality
import stages
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_reduction import TokenReduction, connect, counts, flops, merge, places, ratio_at, reduce
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from simba_compile import explain
from simba_compile.analysis.tasks import Text, TextTask

LAYERS, HIDDEN = 4, 16


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4)
    return MambaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(32, (3, 40), generator=torch.Generator().manual_seed(1))


# --- how many tokens, and at what cost -------------------------------------------------------------------------------


def test_places_of_the_papers_own_depth() -> None:
    assert places(64) == [12, 17, 22, 27, 32, 37, 42]


@given(st.integers(2, 300), st.integers(1, 64), st.floats(0.01, 1.0), st.integers(1, 40))
def test_counts_fall_by_half_of_the_free_tokens_at_most(tokens: int, layers: int, ratio: float, protected: int) -> None:
    before = tokens
    for layer, after in enumerate(counts(tokens, layers, ratio, protected)):
        leaving = before - after
        assert 0 <= leaving <= max(0, before - protected) // 2
        assert leaving == 0 or (layer in places(layers) and after >= ratio * before)
        before = after


def test_counts_by_the_ratio() -> None:
    assert counts(100, 4, 0.8, 1) == [80, 64, 52, 52]  # reduces after layers 0, 1 and 2, and rounds up


def test_flops_are_the_mixers_and_the_similarities() -> None:
    assert flops(100, 4, 1.0, 1, 10.0, 8) == 4000
    mixers = (100 + 80 + 64 + 52) * 10
    similarities = 2 * 8 * (49 * 50 + 39 * 40 + 31 * 32)
    assert flops(100, 4, 0.8, 1, 10.0, 8) == mixers + similarities + 2 * 8 * (99 + 79 + 63)


@given(st.floats(0.0, 0.95))
def test_the_ratio_spends_the_budget_and_no_more(share: float) -> None:
    shape = (512, 24, 1, 1e6, 64)
    dense = flops(512, 24, 1.0, *shape[2:])
    ratio = ratio_at(share * dense, *shape)
    if ratio is None:
        assert flops(512, 24, 0.5, *shape[2:]) > share * dense
    else:
        assert flops(512, 24, ratio, *shape[2:]) <= share * dense
        assert flops(512, 24, ratio + 0.005, *shape[2:]) > share * dense


# --- which tokens leave, and what becomes of them --------------------------------------------------------------------


def plainly(output: Tensor, residual: Tensor, leaving: int, protected: int) -> tuple[list[int], Tensor]:
    """One sequence, token by token: the positions that stay, and what they hold."""
    free = range(len(output) - protected)
    order = sorted(free, key=lambda t: float(output[t].clamp(min=0).mean()))
    less, more = order[: len(order) // 2], order[len(order) // 2 :]

    def alike(a: int, b: int) -> float:
        return float(torch.cosine_similarity(output[a], output[b], dim=0))

    nearest = {t: max(more, key=lambda other: alike(t, other)) for t in less}
    gone = sorted(less, key=lambda t: -alike(t, nearest[t]))[:leaving]
    gone.sort(key=less.index)
    merged_output = gone[leaving // 2 :]
    staying = [t for t in range(len(output)) if t not in gone]
    rows = []
    for t in staying:
        in_residual = [residual[t], *(residual[other] for other in gone if nearest[other] == t)]
        in_output = [output[t], *(output[other] for other in merged_output if nearest[other] == t)]
        rows.append(torch.stack(in_residual).mean(0) + torch.stack(in_output).mean(0))
    return staying, torch.stack(rows)


@given(st.integers(1, 3), st.integers(4, 24), st.integers(1, 3), st.integers(0, 12), st.integers(0, 99))
def test_reduction_is_what_it_says_token_by_token(batch: int, tokens: int, protected: int, leaving: int, seed: int) -> None:
    leaving = min(leaving, (tokens - protected) // 2)
    generator = torch.Generator().manual_seed(seed)
    output, residual = torch.randn(2, batch, tokens, 5, generator=generator)
    _, _, staying = connect(output, leaving, protected)
    reduced = reduce(output, residual, leaving, protected)
    assert reduced.shape == (batch, tokens - leaving, 5)
    for row in range(batch):
        positions, values = plainly(output[row], residual[row], leaving, protected)
        assert staying[row].tolist() == positions == sorted(positions)
        assert positions[-protected:] == list(range(tokens - protected, tokens))
        torch.testing.assert_close(reduced[row], values)


def test_merged_tokens_are_averages() -> None:
    x = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    merged = merge(x, torch.tensor([[0, 2]]), torch.tensor([[3, 3]]))
    assert merged.flatten().tolist() == [1.0, 2.0, 4.0, pytest.approx((1 + 4 + 9) / 3)]


def test_a_token_reduction_without_any_is_the_dense_model(model: MambaForCausalLM, ids: Tensor) -> None:
    with torch.no_grad():
        dense = model(ids, use_cache=False, logits_to_keep=2).logits
        torch.testing.assert_close(TokenReduction(model)(ids, 1.0, 2), dense, atol=1e-5, rtol=1e-4)


def test_sequences_of_a_batch_are_reduced_apart(model: MambaForCausalLM, ids: Tensor) -> None:
    reducing = TokenReduction(model)
    together = reducing(ids, 0.7, 2)
    apart = torch.cat([reducing(row[None], 0.7, 2) for row in ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, reducing(ids, 1.0, 2), atol=1e-3)


# --- the clock -------------------------------------------------------------------------------------------------------


def test_the_clock_finds_every_stage_and_its_products(model: MambaForCausalLM, ids: Tensor) -> None:
    options = {"keep": 0.5, "min_tokens": 4}
    report = explain(model, ids, options=options, use_cache=False, logits_to_keep=1)
    torch._dynamo.reset()
    [run] = stages.clock(model, ids, options, 1)
    found: dict[str, list[Any]] = {}
    for node in run:
        found.setdefault(node.stage, []).append(node)
    pruning = sum(mixer.tokens_out < mixer.tokens_in for mixer in report.mixers)
    each = dict.fromkeys(("x_proj", "dt_proj", "out_proj", "scan", "conv"), LAYERS)
    each |= {"in_proj": LAYERS + pruning, "norm": LAYERS + 1, "score": pruning, "select": pruning}
    assert {stage: len(found[stage]) for stage in each} == each
    first, *rest = report.mixers
    assert pruning == len(rest)  # of the others, the gate is a product of its own, for the tokens that stay
    gates = [(3 * count, HIDDEN, 2 * HIDDEN) for mixer in rest for count in (mixer.tokens_in, mixer.tokens_out)]
    assert [node.product for node in found["in_proj"]] == [(3 * first.tokens_in, HIDDEN, 4 * HIDDEN), *gates]
    rows = [node.product for node in found["out_proj"]]
    assert rows == [(3 * mixer.tokens_out, 2 * HIDDEN, HIDDEN) for mixer in report.mixers]
    for node, mixer in zip(found["norm"], report.mixers, strict=False):
        assert node.bytes == 4 * (2 * 3 * mixer.tokens_in * HIDDEN + HIDDEN)


def test_a_gather_moves_only_what_it_takes(model: MambaForCausalLM, ids: Tensor) -> None:
    kept = torch.arange(10).repeat(3, 1)
    moved = stages._bytes(torch.ops.simba.gather, (torch.ones(3, 40, 8), kept, 1), torch.ones(3, 10, 8))
    assert moved == 2 * 3 * 10 * 8 * 4


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_its_results_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "memory", lambda *asked: {"growth_mib": 1.0})  # a process of its own for each
    page = tmp_path / "docs" / "benchmarks.md"
    measure.main(only="peers,growth,limits", quick=True, out=tmp_path, document=page)
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("peers", "growth", "limits")}
    shares = found["peers"]["shares"]
    for keep in (0.5, 0.3):
        ours, theirs = shares[f"simba keep {keep}"], shares[f"token reduction, FLOPs of keep {keep}"]
        assert theirs <= ours < theirs + 0.02
    assert "mamba-ssm" in found["peers"]["left out"]
    for row in found["growth"]["lengths"]:
        assert row["stages"]["score"] > 0
    text = page.read_text()
    for heading in ("Side by side with its peers", "How cost grows", "How close to what the machine can do"):
        assert f"## {heading}" in text
    for picture in ("benchmarks-growth.png", "benchmarks-limits.png"):
        assert (page.parent / picture).stat().st_size > 10_000 and picture in text


def test_the_command_refuses_a_part_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(measure.typer.BadParameter, match="there is no speed; the parts are peers, quality, growth, limits"):
        measure.main(only="speed", out=tmp_path, document=tmp_path / "page.md")


def test_both_methods_are_scored_on_the_same_sequences(model: MambaForCausalLM) -> None:
    """Where neither drops anything, the paired difference is nothing."""
    text = torch.randint(32, (400,), generator=torch.Generator().manual_seed(3))
    task = TextTask(Text("random", text, torch.ones_like(text)), 4, 4, 32)
    [row] = quality.compare(model, task, "random", 32, (0.999,), 32, lambda what: None)
    assert row["ours"]["share"] == row["reduction"]["share"] == 1.0
    assert row["difference"] == pytest.approx((0.0, 0.0, 0.0), abs=1e-4)
    assert row["ours"]["mean"] == pytest.approx(row["dense"]["mean"], abs=1e-4)


def test_the_page_says_which_method_is_better_how_often() -> None:
    rows = [
        {"unit": "bits per byte", "difference": (0.2, 0.1, 0.3)},  # more bits: ours is better
        {"unit": "accuracy", "difference": (0.2, 0.1, 0.3)},
        {"unit": "accuracy", "difference": (-0.2, -0.3, -0.1)},
        {"unit": "accuracy", "difference": (0.0, -0.1, 0.1)},
        {"unit": "accuracy", "difference": None},
    ]
    said = page._verdict(rows)
    assert said.startswith("Of 4 comparisons ours is better in 2, the token reduction in 1; in 1 ")


def test_what_other_processes_took() -> None:
    assert measure.shared((10.0, 100.0), (13.0, 112.0)) == 0.25
