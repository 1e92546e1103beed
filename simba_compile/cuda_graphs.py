"""Which graphs Inductor is to record as CUDA graphs, and what passes between them and everything else.

A CUDA graph works on fixed addresses. What it returns is memory of its own, which Inductor takes back at the next call of
anything compiled: a prompt's cache would be gone when the first decoding step reads it. And what it is given is copied to
where it was recorded, so that it cannot write into it, unless the caller says that it will stay where it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from simba_compile.kernels.ops.dispatch import GPU
from simba_compile.passes.effects import is_inplace, storage_of, written
from simba_compile.passes.length import value_of

OPS = torch.ops.simba
RECORDINGS = 8  # of one graph, for as many places where what it writes into lies; more take memory


def why_unrecorded(gm: GraphModule, is_prompt: bool) -> str | None:
    """Why a graph is not to be recorded, or None where it is.

    A CUDA graph is recorded for each set of sizes. A decoding step has another one each time, where attention has a cache.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    if not any(_is_on_gpu(value_of(node)) for node in inputs):
        return "nothing that it reads is on a GPU"
    if not is_prompt and any(_varies(value_of(node)) for node in inputs):
        return "the sizes of what it reads are others at each call"
    if any("random" in node.args for node in gm.graph.find_nodes(op="call_function", target=OPS.token_scores)):
        return "the host draws its random numbers"
    made = [node for node, is_made in zip(_outputs(gm), _made(gm), strict=True) if is_made]
    changing = [inputs[place] for place in _written(gm)]
    memory = [place for node in dict.fromkeys([*made, *changing]) if (place := storage_of(node)) is not None]
    if len(memory) > len(set(memory)):
        return "some of its results, or of what it writes into, share memory, and copies would not"
    return None


def _varies(value: Any) -> bool:
    """Whether a tensor has open sizes beside the number of sequences."""
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape[1:])


def beside_cuda_graphs(function: Callable, gm: GraphModule) -> Callable:
    """What runs a graph by a function that Inductor records: its results stay, and it may write into its inputs.

    Results on a GPU are copied. Inputs that are written into, the states of a decoding step, are marked as being where they
    are, as transformers marks those of a cache that it makes: with a cache that is elsewhere, Inductor records the graph
    once more. After `RECORDINGS` of them, states are copied to where a last one has them, and back.
    """
    places, made = _written(gm), _made(gm)
    known: set[tuple[int, ...]] = set()
    copies: dict[tuple[torch.Size, ...], list[Tensor]] = {}

    def run(*args: Any) -> Any:
        states = [args[place] for place in places]
        where = tuple(state.data_ptr() for state in states)
        if where in known or len(known) < RECORDINGS:
            known.add(where)
            return call(*args)
        sizes = tuple(state.shape for state in states)
        if sizes not in copies:
            with torch.inference_mode(False):  # for calls in any mode
                copies[sizes] = [torch.empty_like(state, requires_grad=False) for state in states]
        given = list(args)
        with torch.no_grad():
            for place, state, copy in zip(places, states, copies[sizes], strict=True):
                given[place] = copy.copy_(state)
        values = call(*given)
        with torch.no_grad():
            for state, copy in zip(states, copies[sizes], strict=True):
                state.copy_(copy)
        return values

    def call(*args: Any) -> Any:
        for place in places:
            torch._dynamo.mark_static_address(args[place])
        return [_copied(value) if is_made else value for value, is_made in zip(function(*args), made, strict=True)]

    return run


def _written(gm: GraphModule) -> list[int]:
    """The places of the inputs that the graph writes into."""
    changing = {storage_of(value) for node in gm.graph.nodes if is_inplace(node) for value in written(node)} - {None}
    return [place for place, node in enumerate(gm.graph.find_nodes(op="placeholder")) if storage_of(node) in changing]


def _made(gm: GraphModule) -> list[bool]:
    """Of each output, whether it is in memory that the graph makes."""
    given = {storage_of(node) for node in gm.graph.find_nodes(op="placeholder")} - {None}
    return [isinstance(node, Node) and storage_of(node) not in given for node in _outputs(gm)]


def _outputs(gm: GraphModule) -> list[Any]:
    (outputs,) = gm.graph.output_node().args
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _copied(value: Any) -> Any:
    """A copy of a tensor on a GPU; anything else as it is."""
    return value.clone() if _is_on_gpu(value) else value


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == GPU
