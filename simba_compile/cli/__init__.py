"""The command ``simba``.

Commands only declare their options here and import what they run when they are called, so that ``simba --help`` answers
without loading torch.
"""

import enum
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import simba_compile
from simba_compile.cli import machine

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(simba_compile.__version__)
        raise typer.Exit


def _file(path: Path | None) -> Path | None:
    """Say at once that a file cannot be written, before the work whose results go there; makes its folder."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("a").close()
            if is_new:
                path.unlink()
        except OSError as error:
            raise typer.BadParameter(f"{path} cannot be written: {error.strerror}.") from None
    return path


def _folder(path: Path | None) -> Path | None:
    """Say at once that nothing can be written into a folder; makes it."""
    if path is not None:
        _file(path / ".simba")
    return path


@app.callback()
def simba(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Run pre-trained Mamba models on the tokens that matter: what torch.compile(model, backend="simba") does, measured."""


class Task(enum.Enum):
    """What `simba eval` scores."""

    text = "text"
    recall = "recall"


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="Folder of a byte-level model (a vocabulary of 256 bytes).")] = Path(
        "models/python-bytes"
    ),
    file: Annotated[
        Path | None,
        typer.Option(help="The file to read.", show_default="a module of Python's library held out of training"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How many bytes of the file the model reads.")] = 4096,
    large: Annotated[bool, typer.Option(help="Also time a model of mamba-130m's size with random weights.")] = True,
    plot: Annotated[
        Path | None, typer.Option(callback=_file, help="Draw tokens by layer, and speed against quality, here.")
    ] = None,
) -> None:
    """Read a file with and without pruning: tokens left, time, bits per byte and a continuation."""
    from simba_compile.cli.demo import run

    run(model, file, tokens, large, plot)


class Processor(enum.Enum):
    """What `simba bench` runs on."""

    cpu = "cpu"
    cuda = "cuda"


@app.command()
def bench(
    device: Annotated[
        Processor | None, typer.Option(help="Where to run.", show_default="cuda where torch sees a GPU, else cpu")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            callback=_folder,
            help="Folder for the figures, as JSON and Markdown.",
            show_default="benchmarks/results; with --quick, build/benchmarks",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch, on the CPU.", show_default="torch's own choice")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt, on the CPU.")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model, on the CPU.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender; the slow ones get at most 3.")] = 7,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and prompt, whatever the sizes given: does everything run?")
    ] = False,
    skip_inductor: Annotated[
        bool, typer.Option("--skip-inductor", help="Leave Inductor out: compiling its scan takes minutes.")
    ] = False,
) -> None:
    """Time prompt and decoding side by side with Hugging Face, eager and compiled; measure memory.

    On the CPU the model has mamba-130m's width and random weights; batch 1, float32. On a GPU: every kernel against float64,
    against a copy and against its peers, then models of mamba-130m's, 1.4b's and 2.8b's sizes at 2k, 8k and 32k tokens in
    bfloat16, all within 8 minutes.
    """
    import torch

    command = machine.command("simba")
    out = out or Path("build/benchmarks" if quick else "benchmarks/results")  # not over figures that mean something
    has_gpu = torch.cuda.is_available()
    if device is Processor.cuda and not has_gpu:
        raise typer.BadParameter("torch sees no GPU here.", param_hint="--device")
    if device is Processor.cuda or (device is None and has_gpu):
        from simba_compile.cli import bench_gpu

        inductor = not skip_inductor
        on_gpu = bench_gpu.Settings
        bench_gpu.run(on_gpu.quick("cuda", inductor) if quick else on_gpu.full("cuda", repeats, inductor), out, command)
        return
    from simba_compile.cli.bench import Settings, run

    if quick:
        settings = Settings.quick(threads, not skip_inductor)
    else:
        settings = Settings(layers, tokens, repeats, threads, not skip_inductor)
    run(settings, out, command)


@app.command()
def families(
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            callback=_folder,
            help="Folder for families.json and families.md; what other models have there stays.",
        ),
    ] = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(help="Names of models, with commas.", show_default="all")] = "",
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of ours; Hugging Face's own run at most twice.")] = 5,
    skip_inductor: Annotated[
        bool, typer.Option("--skip-inductor", help="Leave Inductor out: compiling its scans takes minutes.")
    ] = False,
) -> None:
    """Time prompts and decoding steps of each Mamba-based family but `mamba` (see bench), beside Hugging Face's own code.

    Random weights, batch 1, float32. The first two models have about 130 and 150 million parameters, the others are small.
    """
    from simba_compile.cli.bench_families import MODELS, run

    names = [name.strip() for name in only.split(",")] if only else list(MODELS)
    unknown = [name or "model without a name" for name in sorted({*names} - {*MODELS})]
    if unknown:
        known = ", ".join(MODELS)
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; the models are {known}.", param_hint="--only")
    run(names, tokens, repeats, not skip_inductor, out, machine.command("simba"))


ONE = "Options of the backend"


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face Hub.")],
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 2048,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Read only the model's configuration; its weights are random.")
    ] = False,
    keep: Annotated[float, typer.Option(help="Share of the tokens left after the last mixer.", rich_help_panel=ONE)] = 0.1,
    schedule: Annotated[
        str,
        typer.Option(
            help="linear, uniform, or shares with commas, one for each mixer (--keep then does not count).",
            rich_help_panel=ONE,
        ),
    ] = "linear",
    every: Annotated[int, typer.Option(help="Prune at every k-th mixer only.", rich_help_panel=ONE)] = 1,
    placement: Annotated[
        str, typer.Option(help="Drop tokens before a layer's scan (scan), or from its output (layer).", rich_help_panel=ONE)
    ] = "scan",
    protect_first: Annotated[int, typer.Option(help="First tokens that always stay.", rich_help_panel=ONE)] = 0,
    protect_last: Annotated[int, typer.Option(help="Last tokens that always stay.", rich_help_panel=ONE)] = 1,
    min_tokens: Annotated[int, typer.Option(help="No layer has fewer tokens left.", rich_help_panel=ONE)] = 32,
) -> None:
    """Show what the backend does to a model: each mixer, its tokens, its FLOPs, or why it stays dense."""
    from simba_compile.cli.explain import run

    options: dict[str, Any] = {"keep": keep, "schedule": schedule, "every": every, "placement": placement}
    options |= {"protect_first": protect_first, "protect_last": protect_last, "min_tokens": min_tokens}
    if any(map(str.isdigit, schedule)):  # no name
        options["schedule"] = _listed(float, schedule, "--schedule")
    run(model, tokens, config_only, options)


def _listed(convert: Callable[[str], Any], text: str, option: str, least: int | None = None) -> list[Any]:
    """The values of an option that takes several, separated by commas; each at least so much."""
    try:
        values = [convert(part.strip()) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if convert is int else "numbers"
        told = f"{text!r} is no list of {kind} separated by commas."
        raise typer.BadParameter(told, param_hint=option) from None
    if least is not None and min(values) < least:
        raise typer.BadParameter(f"{min(values)} is not at least {least}.", param_hint=option)
    return values


BACKEND = "Options of the backend: values separated by commas"


def _several(told: str) -> Any:
    """An option of the backend that takes several values."""
    return typer.Option(help=told, rich_help_panel=BACKEND)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hugging Face Hub.")],
    task: Annotated[Task, typer.Option(help="Bits per byte of a text, or recall of planted pairs.")] = Task.text,
    text: Annotated[list[Path] | None, typer.Option(help="Task text: a file to read; several are joined.")] = None,
    length: Annotated[str, typer.Option(help="Tokens of a sequence; several with commas.")] = "512",
    keep: Annotated[str, _several("Share of the tokens left after the last mixer.")] = "0.5,0.3,0.1",
    criterion: Annotated[str, _several("What ranks tokens: influence, recent, uniform or random.")] = "influence",
    pool: Annotated[str, _several("A token's score over channels: max, absmax or l2.")] = "max",
    dt_bias: Annotated[str, _several("Bias of the step size Δ: does the score include or exclude it.")] = "include",
    placement: Annotated[str, _several("Drop tokens before a layer's scan (scan), or from its output (layer).")] = "scan",
    schedule: Annotated[str, _several("linear or uniform; no lists of shares.")] = "linear",
    every: Annotated[str, _several("Prune at every k-th mixer only.")] = "1",
    protect_first: Annotated[str, _several("First tokens that always stay.")] = "0",
    protect_last: Annotated[str, _several("Last tokens that always stay; those that are scored do in any case.")] = "1",
    min_tokens: Annotated[str, _several("No layer has fewer tokens left.")] = "32",
    seed: Annotated[str, _several("For the criterion random.")] = "0",
    windows: Annotated[int, typer.Option(min=2, help="Task text: how many windows of it are scored.")] = 48,
    last: Annotated[int, typer.Option(min=1, help="Task text: tokens scored, and protected, at each window's end.")] = 32,
    sequences: Annotated[int, typer.Option(min=2, help="Task recall: how many sequences.")] = 256,
    pairs: Annotated[str, typer.Option(help="Task recall: pairs in a sequence; several with commas.")] = "2",
    within: Annotated[
        int | None, typer.Option(min=1, help="Task recall: plant pairs only among this many last tokens.")
    ] = None,
    smaller: Annotated[
        str | None,
        typer.Option(help="A smaller model, run dense, against MODEL pruned to as many FLOPs; options take one value."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Choose shares at this share of the FLOPs on half of the text, and score them on the rest."),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=2, help="How many lists --budget tries.")] = 60,
    out: Annotated[
        Path,
        typer.Option(
            help="Results, one JSON object a line; those already there for the same names of model and text are taken over."
        ),
    ] = Path("eval.jsonl"),
    plot: Annotated[Path | None, typer.Option(callback=_file, help="Draw quality by keep here; needs matplotlib.")] = None,
) -> None:
    """Score a model at a grid of options: quality against FLOPs, with 95% intervals.

    Options of the backend, --length and --pairs take several values, separated by commas: every combination runs, and the
    dense model.
    """
    from simba_compile.cli.eval import Request, run

    if budget is not None and not math.isfinite(budget):
        raise typer.BadParameter(f"{budget} is no share.", param_hint="--budget")
    if any(map(str.isdigit, schedule)):
        raise typer.BadParameter("only names are compared; simba explain takes a list of shares.", param_hint="--schedule")
    numbers = {"keep": keep}
    whole = {"every": every, "protect_first": protect_first, "protect_last": protect_last}
    whole |= {"min_tokens": min_tokens, "seed": seed}
    names = {"criterion": criterion, "pool": pool, "dt_bias": dt_bias, "placement": placement, "schedule": schedule}
    choices = {
        name: _listed(convert, value, "--" + name.replace("_", "-"))
        for convert, given in ((float, numbers), (str, names), (int, whole))
        for name, value in given.items()
    }
    request = Request(
        model=model,
        task=task.value,
        text=tuple(text or ()),
        lengths=tuple(_listed(int, length, "--length", least=2)),
        choices=choices,
        windows=windows,
        last=last,
        sequences=sequences,
        pairs=tuple(_listed(int, pairs, "--pairs", least=1)),
        within=within,
        smaller=smaller,
        budget=budget,
        evaluations=evaluations,
        out=out,
        plot=plot,
    )
    run(request)


analyze = typer.Typer(help="What goes on inside a model when it reads a text.", no_args_is_help=True)
app.add_typer(analyze, name="analyze")

ModelName = Annotated[str, typer.Option(help="A folder, or a name on the Hugging Face Hub.")]
Texts = Annotated[list[Path], typer.Option("--text", help="A file to read; several are joined.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Windows = Annotated[int, typer.Option(min=2, help="Windows of the text.")]
Figures = Annotated[Path, typer.Option(dir_okay=False, callback=_file, help="The figures, as JSON.")]
Picture = Annotated[Path | None, typer.Option(dir_okay=False, callback=_file, help="Draw it here; needs matplotlib.")]


@analyze.command()
def redundancy(
    model: ModelName,
    text: Texts,
    length: Length = 512,
    windows: Windows = 8,
    data: Figures = Path("redundancy.json"),
    plot: Picture = None,
) -> None:
    """Cosine similarity of adjacent tokens' states, layer by layer (the paper's Figure 2)."""
    from simba_compile.cli.analyze import run_redundancy

    run_redundancy(model, text, length, windows, data, plot)


@analyze.command()
def flow(
    model: ModelName,
    text: Texts,
    length: Length = 512,
    windows: Windows = 8,
    keep: Annotated[float, typer.Option(help="Share of the tokens left after the last mixer.")] = 0.1,
    pool: Annotated[str, typer.Option(help="A score over channels: max, absmax or l2.")] = "max",
    dt_bias: Annotated[str, typer.Option(help="Bias of the step size Δ: does the score include or exclude it.")] = "include",
    layers: Annotated[str | None, typer.Option(help="Mixers, from 1 on, separated by commas.", show_default="all")] = None,
    bins: Annotated[int, typer.Option(min=2, help="Points of a curve.")] = 32,
    data: Figures = Path("flow.json"),
    plot: Picture = None,
) -> None:
    """Each token's influence on a layer's last output, by position, dense and pruned (the paper's Figure 5)."""
    from simba_compile.cli.analyze import run_flow

    chosen = None if layers is None else _listed(int, layers, "--layers")
    options = {"keep": keep, "pool": pool, "dt_bias": dt_bias}
    run_flow(model, text, length, windows, data, plot, options, chosen, bins)
