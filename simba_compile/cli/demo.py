"""``simba demo``: a file read dense and pruned, side by side."""

import copy
import dataclasses
import functools
import math
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from simba_compile.backend import simba
from simba_compile.cli import machine, models, plot
from simba_compile.cli.show import Steps, clock, spread, times
from simba_compile.cli.timing import Timing, side_by_side
from simba_compile.passes import Transformed
from simba_compile.passes.plan import Plan

FILES = ("argparse.py", "statistics.py")  # two that training/corpus.py holds out
KEEPS = (1.0, 0.5, 0.3, 0.1)
HF = "HF eager"
SCORED = 256
CONTINUED = 120
SHOWN = 160  # bytes of the context's end
REPEATS = 3
LARGE_LAYERS, LARGE_TOKENS = 24, 768  # at 2048, Hugging Face alone takes a third of the demo's two minutes
WARM_TOKENS = 64  # the graph takes any length: a short prompt compiles it


@dataclasses.dataclass(frozen=True)
class Window:
    """What the model reads of a file.

    Attributes
    ----------
    name : str
        Where it is from.
    context : bytes
        What it reads.
    after : bytes
        How the file goes on.
    scored : int
        The predictions made at this many last bytes of `context` are scored, against the byte that follows each.
    """

    name: str
    context: bytes
    after: bytes
    scored: int


def run(model_folder: Path, file: Path | None, tokens: int, large: bool, picture: Path | None) -> None:
    """See `simba_compile.cli.demo`."""
    if picture is not None:
        plot.require(picture)
    window = read(file, tokens)
    models.quiet()
    model = models.load_bytes(model_folder)
    console = Console()
    console.print(machine.one_line(), markup=False, highlight=False, style="dim")
    steps = _timing_steps() + len(KEEPS)
    with torch.no_grad(), Steps(steps + (1 + _timing_steps() if large else 0)) as progress:
        _byte_model(console, progress, model, window, picture)
        if large:
            _large_model(console, progress)


def read(file: Path | None, tokens: int) -> Window:
    """The middle of a file, up to the end of a line.

    Raises
    ------
    typer.BadParameter
        Where there is no such file, or too little in it.
    """
    if file is None:
        library = Path(sysconfig.get_path("stdlib"))
        found = [library / name for name in FILES if (library / name).is_file()]
        if not found:
            raise typer.BadParameter(f"{library} has none of {', '.join(FILES)}: name one.", param_hint="--file")
        file = found[0]
    try:
        text = file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}.", param_hint="--file") from None
    tokens = min(tokens, len(text) - 1)  # the last one's prediction is scored too
    if tokens < 2:
        raise typer.BadParameter(f"{file} has {len(text)} bytes: nothing to predict.", param_hint="--file")
    end = (len(text) + tokens) // 2
    end = max(text.rfind(b"\n", tokens, end) + 1, tokens)
    return Window(file.name, text[end - tokens : end], text[end : end + CONTINUED], min(SCORED, tokens // 2))


def _byte_model(console: Console, progress: Steps, model: PreTrainedModel, window: Window, picture: Path | None) -> None:
    ids = torch.tensor([list(window.context)])
    options: dict[str, Any] = {"protect_last": window.scored}
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": window.scored}
    depth: int = model.config.num_hidden_layers
    console.print(
        f"\n{len(window.context)} bytes of {window.name}, read by a model of {depth} layers and "
        f"{model.num_parameters() / 1e6:.1f}M parameters. The last {window.scored} bytes always stay (protect_last), so "
        "that what is predicted at each of them can be scored.",
        highlight=False,
        markup=False,
    )
    timings, logits, plans = _time(progress, model, ids, options, call, warm=len(window.context))
    tokens = len(window.context)
    layers = {keep: plan.counts(tokens) if plan is not None else [tokens] * depth for keep, plan in plans.items()}
    console.print(_layer_table(layers))
    bits = {name: _bits_per_byte(value, window) for name, value in logits.items()}
    console.print(_time_table(timings, bits, "bits per byte"))

    ending = window.context[-SHOWN:]
    console.print(_written("the context ends", ending.partition(b"\n")[2] or ending, "dim"))
    for keep in KEEPS:
        progress.next(f"writing on at {_name(keep)}")
        console.print(_written(f"{_name(keep)} goes on", _generate(model, ids, options | {"keep": keep}), "bold"))
    console.print(_written("the file goes on", window.after, "dim"))
    if picture is not None:
        speeds = {keep: timings[_name(1.0)].median / timings[_name(keep)].median for keep in KEEPS}
        qualities = {keep: bits[_name(keep)] for keep in KEEPS}
        plot.demo(picture, layers, speeds, qualities, f"{len(window.context)} bytes of {window.name}", window.scored)
        console.print(f"\nThe plot is in {picture}.", markup=False, highlight=False)


def _large_model(console: Console, progress: Steps) -> None:
    progress.next(f"making a model of mamba-130m's size: {LARGE_LAYERS} layers, random weights")
    model = models.random_mamba(LARGE_LAYERS, models.MAMBA_130M)
    ids = models.random_ids(models.MAMBA_130M["vocab_size"], LARGE_TOKENS)
    timings, *_ = _time(progress, model, ids, {}, {"use_cache": False, "logits_to_keep": 1}, warm=WARM_TOKENS)
    console.print(
        f"\nThe same for a model of mamba-130m's size ({LARGE_LAYERS} layers, hidden "
        f"{models.MAMBA_130M['hidden_size']}, random weights) on a prompt of {LARGE_TOKENS} tokens, up to the next "
        "token's logits.",
        highlight=False,
    )
    console.print(_time_table(timings))


def _name(keep: float) -> str:
    return "dense (keep 1.0)" if keep == 1 else f"keep {keep}"


def _timing_steps() -> int:
    return 1 + len(KEEPS) * REPEATS + 1


def _time(
    progress: Steps, model: PreTrainedModel, ids: Tensor, options: dict[str, Any], call: dict[str, Any], warm: int
) -> tuple[dict[str, Timing], dict[str, Tensor], dict[float, Plan | None]]:
    """Time the model as Hugging Face runs it, once, and at each keep; with the logits of the last run, and the plans."""
    logits: dict[str, Tensor] = {}
    plans: dict[float, Plan | None] = {}

    def contender(name: str, forward: Callable) -> Callable[[], None]:
        def go() -> None:
            logits[name] = forward(ids, **call).logits

        return go

    chosen = KEEPS[0]

    @functools.wraps(simba)  # by which `capture` knows the backend
    def at_each_keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable:
        """What backend="simba" stands for, at every keep for one trace, which takes most of the time of compiling."""
        compiled = {}
        for keep in KEEPS:
            made: list[Transformed] = []
            compiled[keep] = simba(copy.deepcopy(gm), inputs, options=options | {"keep": keep}, observe=made.append)
            plans[keep] = made[0].plan
        return lambda *args: compiled[chosen](*args)

    def forward_at(keep: float) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal chosen
            chosen = keep
            return compiled_model(*args, **kwargs)

        return forward

    torch._dynamo.reset()
    calls = {HF: contender(HF, model)}
    progress.next("compiling")
    compiled_model = torch.compile(model, backend=at_each_keep)
    for keep in KEEPS:
        forward_at(keep)(ids[:, :warm], **call)
        calls[_name(keep)] = contender(_name(keep), forward_at(keep))
    repeats = {name: 1 if name == HF else REPEATS for name in calls}
    timings = side_by_side(calls, repeats, lambda name: progress.next(f"timing {name}, {ids.shape[1]} tokens"))
    return timings, logits, plans


def _bits_per_byte(logits: Tensor, window: Window) -> float:
    first = len(window.context) - window.scored + 1
    following = (window.context + window.after)[first : first + window.scored]
    return F.cross_entropy(logits[0].float(), torch.tensor(list(following))).item() / math.log(2)


def _generate(model: PreTrainedModel, ids: Tensor, options: dict[str, Any]) -> bytes:
    torch._dynamo.reset()
    # Not torch.compile(model): the generate of what it returns runs the model that is not compiled.
    model.compile(backend="simba", options=options)
    generate: Any = model.generate
    return bytes(generate(ids, max_new_tokens=CONTINUED, do_sample=False)[0, ids.shape[1] :].tolist())


def _written(title: str, text: bytes, style: str) -> Text:
    decoded = text.decode("utf-8", errors="replace").strip("\n").rstrip()
    lines = "".join(char if char.isprintable() or char == "\n" else "·" for char in decoded).split("\n")
    return Text("\n").join([Text(f"── {title}", "cyan"), *(Text.assemble(("│ ", "cyan"), (line, style)) for line in lines)])


def _layer_table(layers: dict[float, list[int]]) -> Table:
    table = Table(title="Tokens left after each layer, first to last", title_justify="left")
    table.add_column("keep")
    table.add_column("tokens")
    width = len(str(max(layers[1.0])))
    for keep, counts in layers.items():
        table.add_row(f"{keep}", " ".join(f"{count:>{width}}" for count in counts))
    return table


def _time_table(timings: dict[str, Timing], bits: dict[str, float] | None = None, heading: str = "") -> Table:
    table = Table(title=f"Medians of {REPEATS} runs in turns; {HF} ran once", title_justify="left")
    table.add_column("")
    for column in ("time", "spread", "over dense", f"over {HF}", *([heading] if bits else [])):
        table.add_column(column, justify="right")
    dense, eager = timings[_name(1.0)].median, timings[HF].median
    for name, timing in timings.items():
        cells = [clock(timing.median), spread(timing.to_dict())]
        cells += [times(dense / timing.median), times(eager / timing.median)]
        table.add_row(name, *cells, *([f"{bits[name]:.3f}"] if bits else []))
    return table
