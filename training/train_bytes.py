"""Train the byte-level testbed: a Mamba of about 2M parameters on the Python standard library's source.

The budget is time: the learning rate falls to zero when ``--minutes`` of active time are over. Only time spent in
training steps counts, and a step that took far longer than usual (the process was paused) counts as a usual one. A run
that was stopped goes on from its checkpoint when the same command is given again.

    python training/train_bytes.py --minutes 60

``--start-from`` trains a model on. ``--autocast`` leaves the gradients as they are to a cosine of 0.9999.
"""

import argparse
import json
import math
import platform
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

REPOSITORY = Path(__file__).resolve().parent.parent

HEAD_CHANNELS, MAMBA2_STATES = 16, 32
"""Of a Mamba-2: channels of a head, and numbers in each channel's state."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices of hidden layers.

    As `torch.optim.Muon`, but in float32 (its bfloat16 products take four times as long on a CPU without bfloat16
    instructions) and with the matrices of a group, which have one shape, in one batched product. Where a matrix holds
    several maps along its output dimension (``parts``), each is orthogonalised on its own.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, parts: int = 1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "parts": parts})

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
            update = torch.stack([torch.lerp(p.grad, self.state[p]["momentum"], group["momentum"]) for p in params])
            maps = update.unflatten(1, (group["parts"], -1))
            scale = math.sqrt(max(1.0, maps.shape[-2] / maps.shape[-1]))
            for p, direction in zip(params, orthogonalise(maps).flatten(1, 2), strict=True):
                p.add_(direction, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix, (..., rows, columns), near 1: quintic Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class WindowStream:
    """Windows of the training text, each byte once in an epoch; an epoch shuffles the files, then the windows."""

    def __init__(self, seed: int, epoch: int = -1, length: int = 0, position: int = 0) -> None:
        self.seed = seed
        self.windows = np.empty((0, 0), dtype=np.uint8)
        self._start(epoch, length, position)

    def next(self, batch: int, length: int) -> Tensor:
        """Return the next windows, int64, of shape (batch, length)."""
        if length != self.length or self.position + batch > len(self.windows):
            self._start(self.epoch + 1, length, 0)
        rows = self.windows[self.position : self.position + batch]
        self.position += batch
        return torch.from_numpy(rows.astype(np.int64))

    def place(self) -> dict[str, int]:
        """Return the arguments that make a stream which goes on from here."""
        return {"seed": self.seed, "epoch": self.epoch, "length": self.length, "position": self.position}

    def _start(self, epoch: int, length: int, position: int) -> None:
        self.epoch, self.length, self.position = epoch, length, position
        if length:
            rng = np.random.default_rng((self.seed, epoch))
            text = np.frombuffer(corpus.training_bytes(epoch, self.seed), dtype=np.uint8)
            text = np.roll(text, -int(rng.integers(len(text))))
            self.windows = rng.permutation(text[: len(text) // length * length].reshape(-1, length))


class ActiveClock:
    """Sums step times; one that is over three times the recent median counts as the median."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.recent: deque[float] = deque(maxlen=25)

    def add(self, step_seconds: float, tokens: int) -> None:
        """Count one step that worked on `tokens` bytes."""
        per_token = step_seconds / tokens
        self.recent.append(per_token)
        usual = statistics.median(self.recent)
        self.seconds += tokens * (usual if per_token > 3 * usual else per_token)


def build_model(args: argparse.Namespace, vocabulary: int, **tokens: int | None) -> PreTrainedModel:
    """Make the untrained model that `args` describe, with so many tokens; `tokens` are the ids of the special ones."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": args.d_model,
        "num_hidden_layers": args.layers,
        "initializer_range": args.init_range,
        "rescale_prenorm_residual": True,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        **tokens,
    }
    if args.architecture == "mamba":
        return MambaForCausalLM(MambaConfig(**common))
    heads = 2 * args.d_model // HEAD_CHANNELS  # the mixer is twice as wide as the residual stream
    sizes = {"num_heads": heads, "head_dim": HEAD_CHANNELS, "n_groups": 1, "state_size": MAMBA2_STATES}
    return Mamba2ForCausalLM(Mamba2Config(**common, **sizes))


def build_byte_model(args: argparse.Namespace) -> PreTrainedModel:
    """Make the untrained model of bytes; byte 0, which separates documents, is its beginning and its padding."""
    return build_model(args, 256, pad_token_id=corpus.SEPARATOR, bos_token_id=corpus.SEPARATOR)


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the large matrices of the mixers, AdamW for all else; no weight decay."""
    matrices, others = defaultdict(list), []
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if args.optimizer == "muon" and kind in ("in_proj", "out_proj", "x_proj"):
            matrices[kind].append(parameter)
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    halves = 2 if args.architecture == "mamba" else 1  # Mamba-2's in_proj holds five maps of different sizes: taken as one
    groups = [{"params": params, "parts": halves if kind == "in_proj" else 1} for kind, params in matrices.items()]
    optimizers: list[torch.optim.Optimizer] = [adamw] + ([Muon(groups, lr=args.muon_lr)] if groups else [])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, files: dict[str, bytes], length: int, last: int = 0, batch_bytes: int = 8192, every: int = 1
) -> float:
    """Score files over windows that do not overlap.

    Parameters
    ----------
    model : nn.Module
        Maps (batch, length) byte ids to an output with ``logits``.
    files : dict of str to bytes
        Their content by name.
    length : int
        Length of a window. A file's last, shorter window is padded, and its padding not scored.
    last : int
        Score only this many bytes at the end of each full window; 0 scores all but the first, of every window.
    batch_bytes, every : int
        Bytes in one forward pass, and how many windows to go on by (more than 1: a quick estimate).

    Returns
    -------
    float
        Mean over the scored bytes.
    """
    windows = corpus.windows_of(files.values(), length, whole=last > 0)[::every]
    ids = torch.tensor([list(window.ljust(length, b"\0")) for window in windows])
    scored = torch.arange(1, length) < torch.tensor([len(window) for window in windows])[:, None]
    scored[:, : length - 1 - last if last else 0] = False
    total, rows = 0.0, max(1, batch_bytes // length)
    for part, mask in zip(ids.split(rows), scored.split(rows), strict=True):
        logits = model(part, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits[mask].float(), part[:, 1:][mask], reduction="sum").item()
    return total / scored.sum().item() / math.log(2)


def compiled(model: nn.Module, backend: str) -> nn.Module:
    """Return the model as the backend runs it ("eager": as it is)."""
    options = {"keep": 1.0} if backend == "simba" else None
    return model if backend == "eager" else torch.compile(model, backend=backend, options=options)


def add_model_and_optimizer(parser: argparse.ArgumentParser, width: int, layers: int) -> None:
    """The options that every training has."""
    add = parser.add_argument
    add("--architecture", choices=("mamba", "mamba2"), default="mamba")
    add("--d-model", type=int, default=width)
    add("--layers", type=int, default=layers)
    add("--init-range", type=float, default=0.1, help="standard deviation of the first weights")
    add("--optimizer", choices=("muon", "adamw"), default="muon")
    add("--lr", type=float, default=4e-3, help="AdamW's peak learning rate")
    add("--muon-lr", type=float, default=0.02, help="Muon's peak learning rate")
    add("--warmup", type=float, default=0.02, help="share of the budget of time or steps")
    add("--clip", type=float, default=1.0, help="largest gradient norm")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="active time; the learning rate reaches zero at its end")
    add("--max-steps", type=int, default=0, help="budget in steps instead of minutes (0: minutes)")
    add("--backend", default="simba", help='backend of torch.compile, or "eager"')
    add("--output", type=Path, default=REPOSITORY / "models" / "python-bytes", help="folder of the saved model")
    add("--checkpoint", type=Path, default=REPOSITORY / "build" / "python-bytes.pt", help="what a stopped run resumes")
    add("--start-from", type=Path, help="folder of a model to train on; its own training is not repeated (default: none)")
    add("--seed", type=int, default=0)
    add_model_and_optimizer(parser, width=192, layers=8)
    add("--length", type=int, default=512, help="window length")
    add("--long-length", type=int, default=2048, help="window length of the last part")
    add("--long-share", type=float, default=0.2, help="share of the budget that the last part takes")
    add("--batch-bytes", type=int, default=4096, help="bytes in a step")
    add("--autocast", action="store_true", help="products in bfloat16; for processors that have instructions for it")
    add("--log-seconds", type=float, default=60.0, help="active time between two points of the curve")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Train, save the model as bfloat16, load it again and write how well it does."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    torch.manual_seed(args.seed)
    model = build_byte_model(args).train()
    if args.start_from is not None:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.start_from, dtype=torch.float32).state_dict())
    optimizers = build_optimizers(model, args)
    stream, clock, curve, step, tokens = WindowStream(args.seed), ActiveClock(), [], 0, 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        stream = WindowStream(**saved["stream"])
        clock, curve, step, tokens = ActiveClock(saved["seconds"]), saved["curve"], saved["step"], saved["tokens"]
        print(f"resumed at step {step}", flush=True)
    run = compiled(model, args.backend)

    def log(loss: float) -> None:
        model.eval()
        held_out = bits_per_byte(run, corpus.held_out_files(), args.length, every=16)
        model.train()
        curve.append({"seconds": clock.seconds, "step": step, "tokens": tokens, "train": loss, "held_out": held_out})
        speed = tokens / max(clock.seconds, 1e-9)
        print(
            f"{clock.seconds:5.0f} s  step {step}  train {loss:.3f}  held-out {held_out:.3f}  {speed:.0f} B/s",
            flush=True,
        )
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
        state |= {"stream": stream.place(), "seconds": clock.seconds, "curve": curve, "tokens": tokens}
        torch.save(state, args.checkpoint.with_suffix(".new"))
        args.checkpoint.with_suffix(".new").replace(args.checkpoint)  # never half a file

    losses: deque[float] = deque(maxlen=50)
    logged = clock.seconds
    while not stop.is_set():
        progress = step / args.max_steps if args.max_steps else clock.seconds / (60 * args.minutes)
        if progress >= 1:
            break
        length = args.long_length if progress >= 1 - args.long_share else args.length
        ids = stream.next(args.batch_bytes // length, length)
        begin = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(progress / max(args.warmup, 1e-9), (1 - progress) / (1 - args.warmup))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            logits = run(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        clock.add(time.perf_counter() - begin, ids.numel())
        step, tokens = step + 1, tokens + ids.numel()
        losses.append(loss.item() / math.log(2))
        if clock.seconds - logged >= args.log_seconds:
            log(statistics.mean(losses))
            logged = clock.seconds
    log(statistics.mean(losses) if losses else math.nan)
    if stop.is_set():
        sys.exit(f"stopped at step {step}; the same command goes on from {args.checkpoint}")
    finish(model, args, curve)
    args.checkpoint.unlink()


def finish(model: PreTrainedModel, args: argparse.Namespace, curve: list[dict[str, float]]) -> None:
    """Save the model, score what was saved, and write ``training.json`` beside it."""
    model.to(torch.bfloat16).save_pretrained(args.output)
    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    run = compiled(saved, args.backend)
    modules, drawn = corpus.held_out_files(), corpus.drawn_files()
    scores = {
        "length_512": bits_per_byte(run, modules, 512),
        "length_2048_last_256": bits_per_byte(run, modules, 2048, last=256),
        "drawn_length_512": bits_per_byte(run, drawn, 512),
        "drawn_length_2048_last_256": bits_per_byte(run, drawn, 2048, last=256),
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report = {
        "bits_per_byte": scores,
        "parameters": sum(p.numel() for p in saved.parameters()),
        **{name: curve[-1][name] for name in ("seconds", "step", "tokens")},
        "args": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": versions | {"transformers": transformers.__version__},
        "held_out": corpus.HELD_OUT,
        "drawn": list(drawn),
        "curve": curve,
    }
    if args.start_from is not None:
        before = json.loads((args.start_from / "training.json").read_text())
        report["before"] = {name: value for name, value in before.items() if name != "curve"}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(scores))


if __name__ == "__main__":
    train(parse(None))
