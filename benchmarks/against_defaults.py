"""Each setting of a file of ``simba eval`` against the default one at the same keep, on the same sequences.

    python benchmarks/against_defaults.py benchmarks/results/eval-text.jsonl

Where the file has no default at that keep, the setting is left out.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from simba_compile.analysis.evaluation import describe
from simba_compile.analysis.intervals import paired

COMMON = ("keep", "min_tokens")


def main(path: Annotated[Path, typer.Argument(help="A file of `simba eval`.", exists=True, dir_okay=False)]) -> None:
    """Print each setting minus the default one at the same keep, paired, with 95% intervals."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_setting = {json.dumps(record["of"], sort_keys=True): record for record in records}
    for record in records:
        of, options = record["of"], record["of"]["options"]
        default = {name: value for name, value in options.items() if name in COMMON}
        other = by_setting.get(json.dumps(of | {"options": default}, sort_keys=True))
        if other is None or other is record or options.get("keep") in (None, 1.0):
            continue
        mean, low, high = paired(record["values"], other["values"])
        pairs = f"{of['pairs']} pairs, " if "pairs" in of else ""
        shares = f"FLOPs {record['share']:.2f} against {other['share']:.2f}"
        print(f"{of['tokens']:5} tokens, {pairs}{describe(options):45} {mean:+.3f} ({low:+.3f} to {high:+.3f})  {shares}")


if __name__ == "__main__":
    typer.run(main)
