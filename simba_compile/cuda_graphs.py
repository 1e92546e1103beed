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


def beside_cuda_graphs(function: Callable, gm: GraphModule) -> Callable:
    """What runs a graph by a function that Inductor records: its results stay, and it may write into its inputs.

    Results on a GPU are copied, and views of one another are then apart. Inputs that are written into, the states of a
    decoding step, are marked as being where they are, as transformers marks those of a cache that it makes: with a cache
    that is elsewhere, Inductor records the graph once more.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    given = {storage_of(node) for node in inputs}
    changing = {storage_of(value) for node in gm.graph.nodes if is_inplace(node) for value in written(node)} - {None}
    places = [place for place, node in enumerate(inputs) if storage_of(node) in changing]
    outputs: Any = gm.graph.output_node().args[0]
    made = [isinstance(node, Node) and storage_of(node) not in given for node in outputs]

    def run(*args: Any) -> Any:
        for place in places:
            torch._dynamo.mark_static_address(args[place])
        return [copied(value) if new else value for value, new in zip(function(*args), made, strict=True)]

    return run


def copied(value: Any) -> Any:
    """A copy of a tensor on a GPU; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.device.type == GPU else value


def varies(gm: GraphModule) -> bool:
    """Whether the graph's inputs have open sizes beside the number of sequences.

    A CUDA graph is recorded for each set of them. A decoding step has another set each time, where attention has a cache.
    """
    values = map(value_of, gm.graph.find_nodes(op="placeholder"))
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape[1:]]
    return any(isinstance(size, torch.SymInt) for size in sizes)
