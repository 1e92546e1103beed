"""Whether a graph holds a stack of layers as a whole, or what a graph break left of one.

A schedule counts the mixers of a model. Where Dynamo cannot trace one of its layers (hooks of accelerate or of FSDP stand
around each, or one has what no graph can hold), every layer becomes a graph of its own. Each of those would begin the
schedule anew, at full length, and drop at once what the whole model drops step by step: another method, of less quality.
"""

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch._dynamo.convert_frame import output_codes
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule

from simba_compile.passes.scans import SCANS
from simba_compile.passes.subgraphs import with_subgraphs
from simba_compile.substitutes import OF_A_PROMPT

WHERE = "TORCH_LOGS=graph_breaks shows where"
_SCANNING = {function.__name__ for function in OF_A_PROMPT}
_parted: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()  # lists found in several graphs of a module


def why_partial(gm: GraphModule) -> str | None:
    """Say which mixers a graph break keeps out of a graph that Dynamo has just made; None where it is whole.

    It is not where a list of layers, in the module whose call the graph is a part of, has some mixers in it and some in
    graphs before it or, for all that is known, in graphs to come. Where neither can be, the model leaves layers out.
    """
    module, goes_on = _broken(gm)
    if module is None:
        return None
    calls = [list(stack.items()) for stack in _calls_of_scans(gm) if stack]
    kinds = tuple({kind for *_, (_, (_, kind)) in calls})
    here = {key.partition("@")[0] for call in calls for key, _ in call}  # Dynamo names a module id, id@1, … by the call
    parted = _parted.setdefault(module, WeakSet())
    for path, layers in module.named_modules():
        if isinstance(layers, nn.ModuleList | nn.Sequential):
            mixers = [part for part in layers.modules() if isinstance(part, kinds)]
            inside = sum(str(id(mixer)) in here for mixer in mixers)
            if 0 < inside < len(mixers) and (goes_on or layers in parted):
                parted.add(layers)
                return (
                    f"Dynamo broke the graph between the {len(mixers)} mixers of {type(module).__name__}.{path}, and has "
                    f"{inside} in this one ({WHERE})"
                )
    return None


def why_cut(gm: GraphModule) -> str:
    """What to add to the reason of a dense mixer: that Dynamo broke the graph inside the module that calls its scan."""
    if _broken(gm)[0] is None or all(_calls_of_scans(gm)):
        return ""
    return f"; Dynamo broke the graph inside this mixer ({WHERE})"


def why_uncompiled() -> str | None:
    """Say which mixer, in whose call Dynamo has just made a graph, is itself none of Dynamo's: its scan is in no graph."""
    for code, module in _running():
        if not _SCANNING.isdisjoint(code.co_names) and code not in output_codes:
            return (
                f"{type(module).__name__}.{code.co_name} runs uncompiled. Dynamo leaves a function so in which a call "
                f"raised an error, until torch._dynamo.reset() ({WHERE})"
            )
    return None


def _calls_of_scans(gm: GraphModule) -> list[dict]:
    """For each scan, the modules in whose calls it stands; none where the graph begins inside of them."""
    nodes = [node for each in with_subgraphs(gm) for node in each.graph.nodes]
    return [node.meta.get("nn_module_stack") or {} for node in nodes if node.target in SCANS]


def _broken(gm: GraphModule) -> tuple[nn.Module | None, bool]:
    """The outermost module in whose call Dynamo broke the graph, None if there is none; and whether layers may follow.

    None can follow where all that is left to do is to return what Dynamo's resumed function returns, behind the last break.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None:
        return None, False  # it is not Dynamo's
    tx = InstructionTranslator.current_tx()
    goes_on = bool(reason.graph_break)
    outermost = tx.f_locals.get("self") if goes_on else None
    called = tx.f_code.co_name
    for code, module in _running():
        outermost = module
        if code.co_filename != nn.modules.module.__file__:  # torch's own returns what the module's method returns
            goes_on = goes_on or not called.startswith("torch_dynamo_resume_in_")
        called = code.co_name
    return (outermost if isinstance(outermost, nn.Module) else None), goes_on


def _running() -> Iterator[tuple[CodeType, nn.Module]]:
    """Modules whose methods run on Python's stack, without Dynamo: inner ones first, to where a compiled one was called."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        if "self" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), nn.Module):
            yield frame.f_code, frame.f_locals["self"]
        frame = frame.f_back
