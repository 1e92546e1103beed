"""Graphs inside a graph: what gradient checkpointing computes again, the branches of ``torch.cond``, and the like.

Dynamo keeps each of them as a module of its own, which a higher-order operator calls with what it reads:

    wrap_body_0 = get_attr(wrap_body_0)
    hidden      = tag_activation_checkpoint(wrap_body_0, hidden, weight, …)

They are lowered like the graph around them. A mixer in one of them cannot prune, for tokens that leave there would have to
leave around it too; then none of the graph does.
"""

from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from simba_compile.passes.effects import subgraphs
from simba_compile.passes.match import Mixer, match
from simba_compile.passes.walk import reached


def with_subgraphs(gm: GraphModule) -> list[GraphModule]:
    """A graph and all graphs inside it, each once."""
    return list(reached([gm], lambda outer: [inner for node in outer.graph.nodes for inner in subgraphs(node)]))


def find_mixers(gm: GraphModule) -> list[Mixer]:
    """The mixers of a graph and of those inside it, in order. Where some stand inside, each says that none can prune."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    mixers = [(place[mixer.scans[0]], mixer) for mixer in match(gm.graph)]
    reason = None
    for node in gm.graph.nodes:
        inside = [mixer for inner in subgraphs(node) for mixer in find_mixers(inner)]
        if inside and reason is None:
            reason = f"mixers stand inside {node.target.__name__}, which has a graph of its own"
        mixers += [(place[node], mixer) for mixer in inside]
    mixers.sort(key=lambda found: found[0])
    for _, mixer in mixers:
        mixer.reason = reason or mixer.reason
    return [mixer for _, mixer in mixers]


def checkpoint_as_eager(gm: GraphModule) -> None:
    """Have a graph checkpoint as the model does without a compiler.

    ``tag_activation_checkpoint`` leaves it to Inductor that the second run draws the same random numbers: run as it is, it
    has another dropout in the backward pass than in the forward pass.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint):
        node.target = checkpointed
    gm.recompile()


def checkpointed(body: GraphModule, *args: Any, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` of a graph, given what Dynamo gives ``tag_activation_checkpoint``."""
    kwargs = {name: value for name, value in kwargs.items() if name != "use_reentrant"}
    if "_checkpoint_context_fn" in body.meta:  # Dynamo, which traces this for Inductor, reads no function out of a dict
        return checkpoint(body, *args, use_reentrant=False, context_fn=body.meta["_checkpoint_context_fn"], **kwargs)
    return checkpoint(body, *args, use_reentrant=False, **kwargs)
