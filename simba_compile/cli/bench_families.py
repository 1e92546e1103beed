"""``simba families``: one model of each Mamba-based family, side by side with Hugging Face, in one run."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import simba_compile
from simba_compile.cli import machine, models
from simba_compile.cli.bench import (
    DECODED,
    KEEP,
    PROMPT_BEFORE_DECODING,
    as_data,
    compile_model,
    empty_cache,
    first_call,
    time_steps,
)
from simba_compile.cli.bench_report import DENSE, EAGER, INDUCTOR, PRUNED
from simba_compile.cli.show import Steps, clock, markdown_table, times
from simba_compile.cli.timing import side_by_side

SLOW_REPEATS = 2  # of Hugging Face's own
_ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4}
_SSD = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64}
_LAYERS = ["mamba", "attention", "mamba", "mamba"] * 2
_SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192}

# Name → class of transformers and the fields of its configuration. The first two have about 130 and 150 million parameters.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2-130m": (
        "Mamba2",
        {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 128, "head_dim": 64, "num_heads": 24, "n_groups": 1}
        | {"vocab_size": 50280, "tie_word_embeddings": True},
    ),
    "bamba-150m": (
        "Bamba",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 32000}
        | {"tie_word_embeddings": True}
        | {"attn_layer_indices": [3, 7, 11, 15], "num_attention_heads": 12, "num_key_value_heads": 4}
        | {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128},
    ),
    "falcon_mamba": ("FalconMamba", _SMALL | {"state_size": 16}),
    "jamba": (
        "Jamba",
        _SMALL | _ATTENTION | {"attn_layer_period": 4, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "zamba": (
        "Zamba",
        _SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8, "attn_layer_period": 4, "attn_layer_offset": 1}
        | {"mamba_dt_rank": 32},
    ),
    "zamba2": (
        "Zamba2",
        _SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 4}
        | {"num_mem_blocks": 1, "mamba_headdim": 64, "n_mamba_heads": 16, "mamba_ngroups": 1, "mamba_d_state": 64},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _SMALL | _ATTENTION | _SSD | {"layer_types": _LAYERS, "shared_intermediate_size": 1024}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon_h1": ("FalconH1", _SMALL | _ATTENTION | _SSD | {"head_dim": 64, "mamba_d_ssm": 1024}),
    "nemotron_h": (
        "NemotronH",
        {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192, "layers_block_type": [*_LAYERS[:4], "moe"] * 2}
        | _ATTENTION | {"head_dim": 64, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
        | {"moe_shared_expert_intermediate_size": 512},
    ),
}  # fmt: skip


def random_model(name: str) -> PreTrainedModel:
    """A model of `MODELS` with random weights, the same ones each time."""
    family, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def run(names: list[str], tokens: int, repeats: int, inductor: bool, out: Path, command: str) -> None:
    """See `simba_compile.cli.families`."""
    models.quiet()
    file = out / "families.json"
    out.mkdir(parents=True, exist_ok=True)
    same = {"machine": machine.describe(), "settings": {"tokens": tokens, "keep": KEEP, "steps": DECODED}}
    results: dict[str, Any] = {**same, "models": {}}
    if file.is_file():
        before = json.loads(file.read_text())
        if same.items() <= before.items():
            results["models"] = before["models"]
        elif set(names) != set(MODELS):
            told = f"{file} has models of another machine, other versions or another length of prompt: name another folder."
            raise typer.BadParameter(told, param_hint="--out")
    stages = 2 + 1 + inductor + (2 + inductor) * repeats  # compiling and timing prompts, compiling steps, timing them
    with empty_cache(), torch.no_grad(), Steps(stages * len(names)) as steps:
        for name in names:
            measured = measure(name, tokens, repeats, inductor, steps)
            results["models"][name] = measured | {"command": command, "date": machine.now()}
            results["models"] = {known: results["models"][known] for known in MODELS if known in results["models"]}
            file.write_text(json.dumps(results, indent=1) + "\n")
            (out / "families.md").write_text(markdown(results))
    show(results)


def measure(name: str, tokens: int, repeats: int, inductor: bool, steps: Steps) -> dict[str, Any]:
    """Time a prompt up to the logits of the next token: Hugging Face eager (and with Inductor), ours dense and pruned.

    Returns
    -------
    dict
        For each contender its `Timing` as data, with "compile" in seconds where it was compiled; "step", the same of
        decoding steps, which never prune; "failed", why Inductor did not run; "parameters"; "mixers", "pruning" and
        "dense because" as `explain` has them.
    """

    def say(what: str) -> None:
        steps.next(f"{name}: {what}")

    say("compiling")
    torch._dynamo.reset()
    model = random_model(name)
    ids = models.random_ids(model.config.vocab_size, tokens)
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    report = simba_compile.explain(model, ids, options={"keep": KEEP}, **call)
    torch._dynamo.reset()
    calls: dict[str, Callable[[], object]] = {EAGER: functools.partial(model, ids, **call)}
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    peers = [EAGER, *([INDUCTOR] if inductor else [])]
    for contender in [*peers[1:], DENSE, PRUNED]:
        calls[contender] = functools.partial(compile_model(contender, model), ids, **call)
        first_call(contender, calls, first, failed)
    say("timing prompts")
    slow = min(repeats, SLOW_REPEATS)
    timings = side_by_side(calls, {each: repeats if each in (DENSE, PRUNED) else slow for each in calls})
    return as_data(timings, first) | {
        "step": time_steps(model, ids, [*peers, PRUNED], repeats, failed, say),
        "failed": failed,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "mixers": len(report.mixers),
        "pruning": sum(mixer.tokens_out < mixer.tokens_in for mixer in report.mixers),
        "dense because": sorted({mixer.reason for mixer in report.mixers if mixer.reason}),
    }


PROMPT = ["", "parameters", "mixers", "prune", "HF eager", "HF Inductor", "ours, keep 1.0", "ours, keep 0.1", "compiling"]
PROMPT += ["over eager", "over Inductor", "over keep 1.0"]
STEP = ["", "HF eager", "HF Inductor", "ours", "over eager", "over Inductor"]


def prompts(results: dict[str, Any]) -> list[list[str]]:
    """The table of prompts, a row for each model."""
    table = []
    for name, data in results["models"].items():
        pruned = data[PRUNED]["median"]
        medians = [data[contender]["median"] if contender in data else None for contender in (EAGER, INDUCTOR, DENSE)]
        table.append(
            [name, f"{data['parameters'] / 1e6:.0f} M", str(data["mixers"]), str(data["pruning"])]
            + ["" if median is None else clock(median) for median in medians]
            + [clock(pruned), " / ".join(clock(data[name]["compile"]) for name in (INDUCTOR, PRUNED) if name in data)]
            + ["" if median is None else f"{median / pruned:.2f}×" if i == 2 else times(median / pruned)
               for i, median in enumerate(medians)]
        )  # fmt: skip
    return table


def steps_of(results: dict[str, Any]) -> list[list[str]]:
    """The table of decoding steps, a row for each model."""
    table = []
    for name, data in results["models"].items():
        ours = data["step"][PRUNED]["median"]
        peers = [data["step"][peer]["median"] if peer in data["step"] else None for peer in (EAGER, INDUCTOR)]
        medians = ["" if median is None else clock(median) for median in peers]
        table.append([name, *medians, clock(ours), *("" if peer is None else f"{peer / ours:.2f}×" for peer in peers)])
    return table


def markdown(results: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    about, settings, measured = results["machine"], results["settings"], results["models"].values()
    commands = "; ".join(sorted({f"`{data['command']}`" for data in measured}))
    dates = sorted(data["date"][:10] for data in measured)
    lines = [
        "# simba families",
        f"A prompt of {settings['tokens']} tokens up to the next token's logits, batch 1, float32, random weights; medians "
        f"of runs in turns. {about['cpu']} ({about['instructions']}), {about['threads']} threads, torch {about['torch']}, "
        f"transformers {about['transformers']}; {' to '.join(sorted({dates[0], dates[-1]}))}, from {commands}.",
        "Inductor compiles for this one length, with an empty cache; `compiling` has its time and ours (keep 0.1).",
    ]
    lines += [
        markdown_table(PROMPT, prompts(results)),
        "## One decoding step",
        f"On a cache that eager mode filled with {PROMPT_BEFORE_DECODING} tokens; of runs of {DECODED} steps. Nothing is "
        "pruned in a step. Inductor compiles it for caches that grow.",
        markdown_table(STEP, steps_of(results)),
        *(f"{name}: {peer} did not run: {reason}"
          for name, data in results["models"].items() for peer, reason in data["failed"].items()),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def show(results: dict[str, Any]) -> None:
    """Print the times and what they come to; the rest of the table is in the page, for a terminal is narrow."""
    for title, headings, rows in (("A prompt", PROMPT, prompts(results)), ("One decoding step", STEP, steps_of(results))):
        table = Table(title=title, title_justify="left")
        shown = [i for i, name in enumerate(headings) if name not in ("parameters", "mixers", "prune", "compiling")]
        for i in shown:
            table.add_column(headings[i], justify="right" if i else "left")
        for cells in rows:
            table.add_row(*(cells[i] for i in shown))
        Console().print(table)
