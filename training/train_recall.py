"""Train the recall testbed: a small Mamba that finds the value of a key among noise (`simba_compile.analysis.recall`).

Every step draws new sequences: a length up to ``--length``, a number of pairs up to ``--pairs``, and all its keys asked for
at the end. Training stops after ``--steps``; scores of the saved model are of sequences with one query that were never seen.

    python training/train_recall.py
    python training/train_recall.py --architecture mamba2 --output models/recall-mamba2
    python training/train_recall.py --d-model 56 --output models/recall-small
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from train_bytes import REPOSITORY, add_model_and_optimizer, build_model, build_optimizers, compiled
from transformers import AutoModelForCausalLM, PreTrainedModel

from simba_compile.analysis import recall

LENGTHS = (96, 192, 384, 768)
"""At which the saved model is scored; the first is the longest that it was trained on."""


def batch(args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Draw one step's sequences: ids, answers, and the position of the first answer."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    pairs = draw(1, args.pairs)
    tokens = draw(2 * pairs + 2, args.length)
    count = max(1, args.batch_tokens // (tokens + 3 * pairs))
    ids, answers = recall.sequences(count, tokens, pairs, generator, queries=pairs)
    return ids, answers, tokens - 1


@torch.no_grad()
def accuracy(model: nn.Module, tokens: int, pairs: int, count: int, seed: int) -> float:
    """Share of unseen sequences whose value is the model's first choice."""
    ids, answers = recall.sequences(count, tokens, pairs, torch.Generator().manual_seed(seed))
    logits = torch.cat([model(part, use_cache=False).logits[:, -1] for part in ids.split(64)])
    return (logits.argmax(-1) == answers[:, 0]).double().mean().item()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=3500, help="the learning rate reaches zero at their end")
    add("--backend", default="simba", help='backend of torch.compile, or "eager"')
    add("--output", type=Path, default=REPOSITORY / "models" / "recall", help="folder of the saved model")
    add("--seed", type=int, default=0)
    add_model_and_optimizer(parser, width=64, layers=3)
    add("--length", type=int, default=96, help="longest context")
    add("--pairs", type=int, default=8, help="most pairs in a sequence")
    add("--batch-tokens", type=int, default=4096, help="tokens in a step")
    add("--log-steps", type=int, default=250, help="steps between two points of the curve")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    """Train, save the model, load it again and write how well it does."""
    torch.manual_seed(args.seed)
    model = build_model(args, recall.VOCABULARY, pad_token_id=0, bos_token_id=None).train()
    optimizers, run = build_optimizers(model, args), compiled(model, args.backend)
    generator = torch.Generator().manual_seed(args.seed)
    curve, losses, begin = [], [], time.perf_counter()
    for step in range(args.steps):
        progress = step / args.steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(progress / max(args.warmup, 1e-9), (1 - progress) / (1 - args.warmup))
        ids, answers, first = batch(args, generator)
        logits = run(ids, use_cache=False).logits[:, first::3]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % args.log_steps == 0:
            model.eval()
            scores = {str(pairs): accuracy(run, args.length, pairs, 256, seed=1) for pairs in (2, args.pairs)}
            model.train()
            seconds = round(time.perf_counter() - begin)
            curve.append({"step": step + 1, "seconds": seconds, "loss": statistics.mean(losses), "accuracy": scores})
            losses.clear()
            print(json.dumps(curve[-1]), flush=True)
    finish(model, args, curve)


def finish(model: PreTrainedModel, args: argparse.Namespace, curve: list[dict]) -> None:
    """Save the model, score what was saved, and write ``training.json`` beside it."""
    model.save_pretrained(args.output)
    saved = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).eval()
    run = compiled(saved, args.backend)
    pairs = sorted({1, 2, 4, args.pairs})
    report = {
        "accuracy": {
            f"tokens_{tokens}": {f"pairs_{p}": accuracy(run, tokens, p, 512, seed=2) for p in pairs} for tokens in LENGTHS
        },
        "parameters": sum(p.numel() for p in saved.parameters()),
        "args": {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "curve": curve,
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["accuracy"]))


if __name__ == "__main__":
    train(parse(None))
