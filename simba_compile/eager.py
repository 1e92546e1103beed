"""How a lowered graph runs as it is, without a compiler: with little between its nodes and the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simba_compile.kernels.ops.dispatch import FUNCTIONS
from simba_compile.passes.subgraphs import with_subgraphs
from simba_compile.passes.tokens import is_simba

ROOM = 3200  # words of a frame that fits no chunk of CPython's, and gets one of 64 KiB with 38 KiB left
TANGENTS = "simba's operators have no forward-mode derivatives: call the uncompiled model under torch.autograd.forward_ad."


def as_it_is(gm: GraphModule) -> Callable:
    """What runs a graph."""
    return with_room(without_tangents(past_autograd(gm) if records_nothing(gm) else gm, gm))


def without_tangents(function: Callable, gm: GraphModule) -> Callable:
    """The function, which runs the graph; it raises an error where forward-mode derivatives would get lost.

    An operator of torch.library's drops the tangents of its inputs.
    """
    if not any(is_simba(node) for each in with_subgraphs(gm) for node in each.graph.nodes):
        return function

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(TANGENTS)
        return function(*args)

    return run


def records_nothing(gm: GraphModule) -> bool:
    """Whether the graph, called without gradients, records none on its own, and holds only plain operators and tensors."""
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) or is_traceable_wrapper_subclass(node.meta.get("example_value")):
            return False
        name = getattr(node.target, "__name__", "")
        if name == "_enter_inference_mode" or (name == "_set_grad_enabled" and node.args != (False,)):
            return False
    return True


def past_autograd(gm: GraphModule) -> Callable:
    """The graph; where no gradients are recorded, its operators are called without detours.

    An operator that is written in Python goes through two functions of autograd's before its own, to find that there is
    nothing to record, and through torch's dispatcher, to find that there is one way to run it (docs/decisions.md).
    """
    straight = past_dispatcher(gm) if any(is_simba(node) for node in gm.graph.nodes) else gm

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return gm(*args)
        graph = gm if is_watched() else straight
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_cache_enabled():
            return graph(*args)  # its copies of weights serve calls with gradients, too: they are made under autograd
        with torch._C._AutoDispatchBelowAutograd():
            return graph(*args)

    return run


def past_dispatcher(gm: GraphModule) -> GraphModule:
    """The graph with the functions of our operators in their places."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.target = FUNCTIONS.get(node.target, node.target)
    return GraphModule(gm, graph)


def is_watched() -> bool:
    """Whether something wants to see each operator: a profiler, a mode, or a transform of torch.func."""
    return bool(
        torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def with_room(function: Callable) -> Callable:
    """The function, called where the stack of Python's frames has room for what it calls.

    CPython (since 3.11) keeps frames in chunks of 16 KiB. Where one ends just above a graph's frame, each operator that the
    graph calls maps another and gives it back: a decoding step then takes up to half as long again, by how deep in other
    functions the model is called. A frame that fits none gets one of its own, with room behind it.
    """

    def run(*args: Any) -> Any:
        return function(*args)

    run.__code__ = run.__code__.replace(co_stacksize=ROOM)
    return run
