"""The entry point: ``torch.compile(model, backend="simba", options={...})`` calls `simba` with each graph.

Dynamo ─▶ capture (while it traces) ─▶ graph_breaks (is it a whole?) ─▶ passes (in `passes/__init__.py`, in order)
       ─▶ inner compiler ─▶ callable
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from simba_compile import capture, kernels, symbolic_length
from simba_compile.cuda_graphs import beside_cuda_graphs, why_unrecorded
from simba_compile.eager import as_it_is, without_tangents
from simba_compile.graph_breaks import why_cut, why_partial, why_uncompiled
from simba_compile.options import OptionError, Options
from simba_compile.passes import Transformed, transform
from simba_compile.passes.length import expression, value_of
from simba_compile.recompile_limit import make_room

log = logging.getLogger("simba_compile")

PADDED = "a sequence ends in padding, and the score asks what matters to the last position; pad on the left"


def simba(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    observe: Callable[[Transformed], None] | None = None,
) -> Callable:
    """Compile one graph of Dynamo's. Registered as the backend ``"simba"``.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    example_inputs : sequence
        Its inputs, as Dynamo shows them.
    options : mapping or Options, optional
        See `simba_compile.Options`.
    mode : str, optional
        Passed on to Inductor, which then is what compiles the rest, where `inner` leaves that open. `torch.compile` takes
        either a mode or options.
    observe : callable, optional
        Is shown what the passes made of the graph; `simba_compile.explain` listens here.

    Raises
    ------
    ValueError
        For options that are not valid.
    """
    symbolic_length.forget()
    try:
        chosen = Options.from_mapping(options)
        if mode is not None:
            if chosen.inner not in ("auto", "inductor"):
                raise OptionError(f"mode={mode!r} is for Inductor, and option inner is {chosen.inner!r}: leave one out.")
            chosen = dataclasses.replace(chosen, inner="inductor")
        partial, cut = why_partial(gm), why_cut(gm)
        result = transform(gm, chosen, partial)
    except OptionError as error:
        raise capture.InvalidOptions(str(error)) from None
    for mixer in result.mixers:
        if mixer.reason is not None:
            mixer.reason += cut
    if result.mixers:
        make_room()
    _log(result, partial)
    if observe is not None:
        observe(result)
    return run_by_length(result, mode)


def run_by_length(result: Transformed, mode: str | None = None) -> Callable:
    """What runs the graph: pruned where its length leaves something to prune, else dense."""
    dense = compile_inner(result.dense, result.options.inner, mode, is_prompt=bool(result.mixers))
    if result.pruned is None or result.plan is None:
        return dense
    pruned, plan = compile_inner(result.pruned, result.options.inner, mode), result.plan
    tokens_of = plan.length.reader(result.dense.graph.find_nodes(op="placeholder"))
    told: set[str] = set()

    def run(*args: Any) -> Any:
        tokens = tokens_of(args)
        graph, numbers = result.of_call(args, tokens)
        if graph is result.dense:
            level, reason = logging.INFO, plan.of_call(args).why_all_stay(int(tokens))
        elif plan.ends_in_padding(args):
            level, reason = logging.WARNING, PADDED
        else:
            return pruned(*args, *numbers)
        if reason not in told:
            log.log(level, "Dense: %s.", reason)
        told.add(reason)
        return dense(*args)

    return run


def compile_inner(gm: GraphModule, inner: str, mode: str | None = None, is_prompt: bool = True) -> Callable:
    """Hand a lowered graph to what compiles the rest.

    "auto" runs it as it is: on the CPU, where the time goes into matrix products and our kernels, that is as fast as
    Inductor's code and needs no compiling (docs/decisions.md).
    """
    if inner in ("auto", "eager"):
        return as_it_is(gm)
    # A torch.compile of its own, at run time: it makes symbols and guards for the counts by itself. Around the graph stands
    # a function, since Dynamo skips the `forward` of every GraphModule that was made while it compiles (it would trace the
    # Python code of our operators instead, one by one), and cannot trace those of its own, which write their code when they
    # are first called. A code object for each, since Dynamo counts the compilations of it.
    numbers = take_numbers(gm.graph)
    graph = GraphModule(gm, gm.graph)

    def whole(*args: Any) -> Any:
        return graph(*args)

    backend = inductor_for(graph, mode, is_prompt) if inner == "inductor" else inner
    compiled = torch.compile(capture.with_own_code(whole), backend=backend, dynamic=not is_fixed(graph))

    def call(*args: Any) -> Any:  # in any case: Dynamo unwraps what it is given, to disable itself around it
        given = list(args)
        for place in numbers:
            given[place] = given[place].item()
        return compiled(*given)

    around = on_gpu_of_inputs(call) if inner == "aot_eager" else call
    if isinstance(backend, Inductor) and backend.records_cuda_graphs:
        around = beside_cuda_graphs(around, graph)
    return without_tangents(around, graph)


def take_numbers(graph: Graph) -> list[int]:
    """Have a graph take a model's numbers as such, and say at which places it takes them.

    Dynamo hands a number over as a tensor where another model's was another, or with ``dynamic=True``. The graph reads it
    off (`Tensor.item`), at which Dynamo breaks graphs when it traces this one.
    """
    numbers = []
    for place, node in enumerate(graph.find_nodes(op="placeholder")):
        reads = list(node.users)
        if reads and all(read.target == "item" and isinstance(value_of(read), torch.SymFloat) for read in reads):
            for read in reads:
                read.replace_all_uses_with(node)
                graph.erase_node(read)
            numbers.append(place)
    return numbers


def inductor_for(gm: GraphModule, mode: str | None, is_prompt: bool) -> "Inductor":
    """Inductor in this mode; without CUDA graphs where this graph is not to be recorded."""
    inductor = Inductor(mode, None, True)
    reason = why_unrecorded(gm, is_prompt) if inductor.records_cuda_graphs else None
    if reason is None:
        return inductor
    log.info("Not recorded as a CUDA graph: %s.", reason)
    return Inductor(mode, {"triton.cudagraphs": False}, True)


def is_fixed(gm: GraphModule) -> bool:
    """Whether the graph is for inputs of these sizes alone, as a decoding step's may be."""
    values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else [value])]
    return all(isinstance(size, int | torch.SymInt) and expression(size).is_Integer for size in sizes)


class Inductor(torch._TorchCompileInductorWrapper):
    """Inductor, which takes nothing out of its cache on disk that other versions of our operators have left there.

    AOTAutograd writes the operators' gradients, sizes and kernels into what it caches, and looks it up by their names.
    """

    @property
    def records_cuda_graphs(self) -> bool:
        """Whether its mode, or torch's configuration, says so."""
        return self.config.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Callable:
        """Compile a graph."""
        config = torch.compiler.config
        tag = f"{config.cache_key_tag} simba_compile {kernels_digest()}"
        with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)


@functools.cache
def kernels_digest() -> str:
    """A number for the Python code of the operators: their schemas, gradients, sizes and kernels."""
    files = sorted(Path(kernels.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def on_gpu_of_inputs(function: Callable) -> Callable:
    """The function, called with the GPU of its inputs as the current one.

    There a graph of AOTAutograd's starts Triton's kernels, whichever GPU their tensors are on. Inductor's code sees to it.
    """

    def run(*args: Any) -> Any:
        on_gpu = next((value for value in args if isinstance(value, Tensor) and value.is_cuda), None)
        with contextlib.nullcontext() if on_gpu is None else torch.cuda.device_of(on_gpu):
            return function(*args)

    return run


def _log(result: Transformed, partial: str | None) -> None:
    pruning = 0 if result.plan is None else len(result.plan.pruning)
    if not result.mixers:
        uncompiled = why_uncompiled()
        if uncompiled is not None and result.options.prunes:
            capture.warn_once(f"Dense: {uncompiled}.")
        log.info("Nothing to prune in this graph: a decoding step, or a model without a mixer.")
        return
    log.info("%d mixers found, %d of them prune.", len(result.mixers), pruning)
    if result.on_all_tokens:
        log.info("Between them, on all tokens, those that left too: %s.", ", ".join(result.on_all_tokens))
    dense = next((mixer for mixer in result.mixers if mixer.reason is not None), None)
    if dense is None or not result.options.prunes or dense.x.shape[1] == 1:  # of one token, nothing can be dropped
        return
    if partial:
        capture.warn_once(f"Dense: {partial}.")
    else:
        log.warning("%s and the mixers after it stay dense: %s.", dense.path, dense.reason)


capture.install(simba)
