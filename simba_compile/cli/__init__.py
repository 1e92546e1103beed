"""The command ``simba``.

Commands only declare their options here and import what they run when they are called, so that ``simba --help`` answers
without loading torch.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help='Run pre-trained Mamba models on the tokens that matter: what torch.compile(model, backend="simba") does, '
    "shown and measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    model: Annotated[Path, typer.Option(help="Folder of a byte-level model (a vocabulary of 256 bytes).")] = Path(
        "models/python-bytes"
    ),
    file: Annotated[
        Path | None,
        typer.Option(help="The file to read. [default: a module of Python's library held out of training]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="How many bytes of the file the model reads.")] = 4096,
    large: Annotated[bool, typer.Option(help="Also time a model of mamba-130m's size with random weights.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens by layer, and speed against quality, here.")] = None,
) -> None:
    """Read a file with and without pruning: tokens left, time, bits per byte and a continuation."""
    from simba_compile.cli.demo import run

    run(model, file, tokens, large, plot)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("benchmarks/results"),
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's own choice]")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt.")] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender; the slow ones get at most 3.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and prompt: does everything run?")] = False,
    skip_inductor: Annotated[
        bool, typer.Option("--skip-inductor", help="Leave Inductor out: compiling its scan takes minutes.")
    ] = False,
) -> None:
    """Time prompt and decoding side by side with Hugging Face, eager and compiled; measure memory.

    The model has mamba-130m's width and random weights; batch 1, float32.
    """
    from simba_compile.cli.bench import Settings, run

    if quick:
        settings = Settings.quick(threads, not skip_inductor)
    else:
        settings = Settings(layers, tokens, repeats, threads, not skip_inductor)
    run(settings, out, shlex.join(["simba", *sys.argv[1:]]))


@app.command()
def families(
    out: Annotated[Path, typer.Option(help="Folder for families.json and families.md.")] = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(help="Names of models, with commas. [default: all]")] = "",
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of ours; Hugging Face's own run at most twice.")] = 5,
    inductor: Annotated[
        str, typer.Option(help="Models to compile with Inductor as well, which takes minutes.")
    ] = "mamba2-130m,bamba-150m",
) -> None:
    """Time one model of each Mamba-based family, dense and pruned, beside Hugging Face's own code.

    Random weights, batch 1, float32. The first two models have about 130 and 150 million parameters, the others are small.
    """
    from simba_compile.cli.bench_families import MODELS, run

    names = [name.strip() for name in only.split(",") if name.strip()] or list(MODELS)
    unknown = sorted({*names} - {*MODELS})
    if unknown:
        known = ", ".join(MODELS)
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; the models are {known}.", param_hint="--only")
    run(names, tokens, repeats, inductor.split(","), out, shlex.join(["simba", *sys.argv[1:]]))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face Hub.")],
    keep: Annotated[float, typer.Option(help="Share of the tokens left at the last mixer.")] = 0.1,
    tokens: Annotated[int, typer.Option(min=2, help="Length of the prompt.")] = 2048,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Read only the model's configuration; its weights are random.")
    ] = False,
) -> None:
    """Show what the backend does to a model: each mixer, its tokens, its FLOPs, or why it stays dense."""
    from simba_compile.cli.explain import run

    run(model, keep, tokens, config_only)
