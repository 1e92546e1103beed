"""What a compiled model goes through in service: modes of autograd, autocast, threads, copies, saving, workers."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import FAMILIES, KEEP_FEW, close, pruned_exactly, random_ids, simba, tiny_model
from torch import Tensor, nn

from simba_compile.backend import is_fixed
from simba_compile.cli.models import going_on
from simba_compile.passes import Transformed
from simba_compile.passes.tokens import is_simba


@torch.no_grad()
def logits(model: Any, length: int = 50, batch: int = 2) -> Tensor:
    """What the model says to random tokens."""
    return model(random_ids(batch, length)).logits


@torch.no_grad()
def prompt_and_step(model: Any) -> tuple[Tensor, Tensor]:
    """What the model says to random tokens, and to one more."""
    ids = random_ids(2, 41)
    prompt = model(ids[:, :-1].clone(), use_cache=True)
    return prompt.logits, model(ids[:, -1:].clone(), use_cache=True, **going_on(prompt)).logits


def test_every_mode_of_autograd_computes_the_same() -> None:
    compiled = simba(tiny_model(), **KEEP_FEW)
    expected = logits(compiled)
    with torch.inference_mode():
        assert torch.equal(compiled(random_ids(2, 50)).logits, expected)
    trained = compiled(random_ids(2, 50)).logits
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach(), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("keep", [1.0, 0.2])
def test_autocast(family: str, keep: float) -> None:
    model = tiny_model(family)
    compiled = simba(model, **{**KEEP_FEW, "keep": keep})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = logits(compiled), logits(model)
    exact = logits(model) if keep == 1 else pruned_exactly(model, random_ids(2, 50), **{**KEEP_FEW, "keep": keep}).logits
    if keep == 1:  # as near as Hugging Face's own autocast, token by token
        error = (ours.float() - exact).norm(dim=-1).median()
        assert error <= 1.5 * (theirs.float() - exact).norm(dim=-1).median()
    else:  # which tokens stay may differ by rounding; the last one always does
        assert ours[:, -1].isfinite().all()
        assert torch.nn.functional.cosine_similarity(ours[:, -1].float(), exact[:, -1], dim=-1).min() > 0.9


@torch.no_grad()
def test_autocast_where_norms_are_wider() -> None:
    """Jamba's norms give steps, B and C in float32 beside x in bfloat16, in a prompt and in a step."""
    model = families.tiny_model("jamba")
    compiled, exact = simba(model, keep=1.0), prompt_and_step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = prompt_and_step(compiled), prompt_and_step(model)
    for found, eager, right in zip(ours, theirs, exact, strict=True):
        assert found.dtype == eager.dtype
        error = (found.float() - right).norm(dim=-1).median()
        assert error <= 1.5 * (eager.float() - right).norm(dim=-1).median()


def test_threads_may_share_a_compiled_model() -> None:
    compiled = simba(tiny_model(), **KEEP_FEW)
    lengths = [40, 75, 61, 90, 33, 58] * 3
    expected = {length: logits(compiled, length) for length in set(lengths)}
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda length: logits(compiled, length), lengths))
    for length, result in zip(lengths, found, strict=True):
        assert torch.equal(result, expected[length])


def test_the_first_calls_may_come_from_threads() -> None:
    model = tiny_model(dtype=torch.float64)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: logits(simba(model, **KEEP_FEW), 50), range(3)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    close(found[0], pruned_exactly(model, random_ids(2, 50), **KEEP_FEW).logits, 1e-6)  # logits are float32


def test_copies_and_state_dicts() -> None:
    model = tiny_model()
    model.compile(backend="simba", options=KEEP_FEW)
    expected = logits(model)
    twin = copy.deepcopy(model)
    twin.compile(backend="simba", options=KEEP_FEW)  # nn.Module leaves its compiled call out of copies, for any backend
    assert torch.equal(logits(twin), expected)
    other = tiny_model(seed=3)
    other.compile(backend="simba", options=KEEP_FEW)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    wrapped = simba(model, **KEEP_FEW)
    assert {name.removeprefix("_orig_mod.") for name in wrapped.state_dict()} == set(model.state_dict())


def test_a_compiled_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model = tiny_model()
    model.compile(backend="simba", options=KEEP_FEW)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.compile(backend="simba", options=KEEP_FEW)
    assert torch.equal(logits(again), expected)


def test_a_pickled_model_is_not_compiled_and_can_be(tmp_path: Path) -> None:
    """`torch.save` of a whole model leaves its compiled call out, for any backend."""
    model = tiny_model()
    dense = logits(model)
    model.compile(backend="simba", options=KEEP_FEW)
    expected = logits(model)
    torch.save(model, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(logits(again), dense)
    again.compile(backend="simba", options=KEEP_FEW)
    assert torch.equal(logits(again), expected)


def test_reset_forgets_and_compiles_again() -> None:
    compiled = simba(tiny_model(), **KEEP_FEW)
    expected = logits(compiled)
    torch._dynamo.reset()
    assert torch.equal(logits(compiled), expected)


def answer(model: nn.Module, pipe: Connection) -> None:
    """What a worker process does: run the model, as DataLoader's workers do on one thread."""
    torch.set_num_threads(1)
    pipe.send(logits(model).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    model = tiny_model(layers=2)
    model.compile(backend="simba", options=KEEP_FEW)
    expected = logits(model)  # the parent has used its threads before it forks
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    if method == "spawn":  # a compiled call is not pickled: the worker gets the model as it was, and compiles
        model = tiny_model(layers=2)
    worker = context.Process(target=answer if method == "fork" else compile_and_answer, args=(model, theirs))
    worker.start()
    assert ours.poll(120)
    torch.testing.assert_close(torch.tensor(ours.recv()), expected, rtol=0, atol=1e-5)
    worker.join(20)
    assert worker.exitcode == 0


def compile_and_answer(model: nn.Module, pipe: Connection) -> None:
    """What a spawned worker does."""
    model.compile(backend="simba", options=KEEP_FEW)
    answer(model, pipe)


class Lines(torch.utils.data.Dataset):
    """Lines of a text, each with the model's logits for it: what a filter that runs in DataLoader's workers computes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return logits(self.model, 40 + i, 1)[0, -1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loaders_workers(method: str) -> None:
    """Forked workers have the compiled model; it reaches spawned ones as it was before compiling, as pickling leaves it."""
    model = tiny_model(layers=2)
    model.compile(backend="simba", options={**KEEP_FEW, "keep": 1.0})
    expected = torch.stack([logits(model, 40 + i, 1)[0, -1] for i in range(4)])
    loader = torch.utils.data.DataLoader(Lines(model), batch_size=2, num_workers=2, multiprocessing_context=method)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-4, atol=1e-4)


# --- training in several processes, dispatched models, hooks ----------------------------------------------------------


_groups: list[Any] = []


@contextlib.contextmanager
def process_group(folder: Path, rank: int = 0, processes: int = 1) -> Iterator[None]:
    """A gloo group of processes that meet in a folder. It is held for good, lest DDP's wrapper is the last to have it.

    That one would free the group with the GIL held, and wait for a thread of gloo's that may need the GIL to forget what
    it did last. With torch 2.13 alone, the 17th of 200 such groups hung; held, none did.
    """
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    _groups.append(torch.distributed.group.WORLD)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_one_step(rank: int, folder: Path) -> None:
    """One of two processes: a step on its half of the batch, gradients averaged by DDP."""
    torch.set_num_threads(1)
    torch._dynamo.config.optimize_ddp = False
    with process_group(folder, rank, 2):
        model = tiny_model(dtype=torch.float64, layers=2).train()
        compiled = torch.compile(nn.parallel.DistributedDataParallel(model), backend="simba", options=KEEP_FEW)
        ids = random_ids(4, 40)[2 * rank : 2 * rank + 2]
        out = compiled(ids, labels=ids)
        out.loss.backward()
        torch.save((out.logits.detach(), [parameter.grad for parameter in model.parameters()]), folder / str(rank))


def test_ddp_forward_and_backward(tmp_path: Path) -> None:
    """Two gloo processes: each has the reference's logits, and both the mean of the halves' gradients."""
    torch.multiprocessing.spawn(train_one_step, (tmp_path,), nprocs=2)
    model, ids = tiny_model(dtype=torch.float64, layers=2).train(), random_ids(4, 40)
    results = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for half, (found, _) in zip(ids.chunk(2), results, strict=True):
        expected = pruned_exactly(model, half, **KEEP_FEW).logits
        size = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected.detach().double(), rtol=0, atol=1e-5 * size)
        loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), half[:, 1:].flatten())
        (loss / 2).backward()
    for first, second, parameter in zip(results[0][1], results[1][1], model.parameters(), strict=True):
        assert torch.equal(first, second)
        assert parameter.grad is not None
        torch.testing.assert_close(first, parameter.grad, rtol=0, atol=1e-5 * parameter.grad.abs().max().item())


def test_ddp_that_splits_graphs_is_dense_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo's default under DDP."""
    with process_group(tmp_path), caplog.at_level("WARNING", "simba_compile"):
        model = tiny_model(layers=1)
        compiled = torch.compile(nn.parallel.DistributedDataParallel(model), backend="simba", options=KEEP_FEW)
        found = logits(compiled, 20)
    torch.testing.assert_close(found, logits(model, 20), rtol=1e-4, atol=1e-4)
    assert "optimize_ddp = False" in caplog.text


@pytest.mark.parametrize("compile_first", [False, True])
def test_a_model_dispatched_by_accelerate(compile_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its hooks break the graph around every module: dense, with the reason."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(layers=1)
    expected = logits(model, 40)
    if compile_first:
        model.compile(backend="simba", options=KEEP_FEW)
    dispatched = accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    if not compile_first:
        dispatched.compile(backend="simba", options=KEEP_FEW)
    with caplog.at_level("WARNING", "simba_compile"):
        found = logits(dispatched, 40)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert "stay dense: no projection and residual add follow its scan" in caplog.text


def test_a_device_map_of_one_device_prunes(tmp_path: Path, graphs: list[Transformed]) -> None:
    """accelerate sets no hooks then."""
    pytest.importorskip("accelerate")
    model = tiny_model(layers=2)
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path, device_map="cpu").eval()
    found = logits(simba(mapped, **KEEP_FEW))
    assert torch.equal(found, logits(simba(model, **KEEP_FEW)))
    assert graphs and all(graph.pruned is not None for graph in graphs)


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_inside_what_is_compiled(mode: str, graphs: list[Transformed]) -> None:
    """As accelerate and Trainer have it: the logits of all positions leave the region, which prunes as one outside does."""
    model, ids = tiny_model(layers=2), random_ids(2, 50)

    def within(ids: Tensor) -> Tensor:
        with MODES[mode]():
            return model(ids).logits

    found = simba(within, **KEEP_FEW)(ids)
    with MODES[mode]():
        expected = simba(model, **KEEP_FEW)(ids).logits
    assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad
    assert graphs and all(graph.pruned is not None for graph in graphs)


def test_weights_changed_in_place_are_seen() -> None:
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(model, **KEEP_FEW)
    before = logits(compiled)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log.add_(0.5)
            layer.mixer.in_proj.weight.mul_(0.7)
    after = logits(compiled)
    assert not torch.allclose(before, after)
    expected = pruned_exactly(model, random_ids(2, 50), **KEEP_FEW).logits
    torch.testing.assert_close(after.double(), expected.double(), rtol=0, atol=1e-5 * expected.abs().max().item())


def test_one_model_with_several_options_in_one_process() -> None:
    model = tiny_model(dtype=torch.float64, layers=3)
    every: list[dict[str, Any]] = [
        KEEP_FEW,
        {**KEEP_FEW, "placement": "layer"},
        {"keep": 0.6, "schedule": "uniform", "min_tokens": 1, "pool": "l2"},
    ]
    compiled = [simba(model, **options) for options in every]
    for _ in range(2):  # compiled one after the other, then taking turns
        for call, options in zip(compiled, every, strict=True):
            expected = pruned_exactly(model, random_ids(2, 50), **options).logits
            size = expected.abs().max().item()
            torch.testing.assert_close(logits(call).double(), expected.double(), rtol=0, atol=1e-5 * size)


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"layer_norm_epsilon": 1e-3, "hidden_size": 40, "state_size": 5},
    "mamba2": {"layer_norm_epsilon": 1e-3, "hidden_size": 40, "state_size": 10, "num_heads": 10},
}


def operators(results: list[Transformed]) -> list[Counter[str]]:
    """How often each graph calls each of our operators."""
    whole = [result.pruned or result.dense for result in results]
    return [Counter(str(node.target) for node in gm.graph.nodes if is_simba(node)) for gm in whole]


@pytest.mark.parametrize("family", OTHER_MODELS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_model_after_another_one_is_as_alone(family: str, dynamic: bool | None, graphs: list[Transformed]) -> None:
    """What differs (eps of norms, sizes of states) is a symbol to Dynamo then, as everything is where all is dynamic."""
    for config in ({}, OTHER_MODELS[family]):
        prompt_and_step(simba(families.tiny_model(family, **config), dynamic=dynamic, **KEEP_FEW))
    torch._dynamo.reset()
    prompt_and_step(simba(families.tiny_model(family, **OTHER_MODELS[family]), **KEEP_FEW))
    first, second, alone = operators(graphs[:2]), operators(graphs[2:4]), operators(graphs[4:])
    assert first == second == alone
    assert alone[1]["simba.mixer_update" if family == "mamba" else "simba.ssd_mixer_update"] == 3
    fixed = [is_fixed(result.dense) for result in graphs]  # an inner compiler is told
    assert fixed == [False, dynamic is None] * 2 + [False, True]


def test_numbers_of_a_model_after_another_one_reach_the_inner_compiler() -> None:
    """Dynamo hands them over as tensors, which its own code reads."""
    sizes = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_local_experts": 0}
    torch._dynamo.utils.counters.clear()
    for multiplier in (0.3, 0.6):
        model = families.tiny_model("granitemoehybrid", residual_multiplier=multiplier, **sizes)
        whole = prompt_and_step(simba(model, inner="aot_eager", **KEEP_FEW))
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    for found, expected in zip(whole, prompt_and_step(simba(model, **KEEP_FEW)), strict=True):
        close(found, expected, 1e-6)


def test_hooks_see_restored_states() -> None:
    """A forward hook on each block is shown what `output_hidden_states` shows: every position, whatever was pruned."""
    model = tiny_model(dtype=torch.float64, layers=3)
    seen: list[Tensor] = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = pruned_exactly(model, random_ids(2, 50), **KEEP_FEW)
    seen.clear()
    found = logits(simba(model, fullgraph=False, **KEEP_FEW))
    assert len(seen) == 3
    for ours, theirs in zip(seen, expected.hidden_states, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())
    size = expected.logits.abs().max().item()
    torch.testing.assert_close(found.double(), expected.logits.double(), rtol=0, atol=1e-5 * size)
