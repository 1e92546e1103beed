"""Mutation testing: ``python tests/mutate.py RESULTS [--files ...] [--tests ...] [--sample N] ...``.

Changes one place of the passes or the options at a time (`mutants` lists how) and runs the tests that execute its line, the
quickest first, until one fails. A mutant that no test notices shows a test that is missing, or code that makes no
difference. Every mutant runs in a fork of a process that has torch and transformers loaded, and never touches a file.
RESULTS is a file of JSON lines; a run that was cut off goes on where it stopped. docs/testing.md has what was found.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch
import transformers.models.mamba.modeling_mamba  # noqa: F401  (loaded once, before all forks)

ROOT = Path(__file__).parents[1]
FILES = ["simba_compile/options.py", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("simba_compile/passes/*.py"))]
SUBJECTS = ["options", "passes", "arguments", "lower", "norms", "mixer", "ssd_mixer", "tokens", "rows", "attention"]
LARGER = ["along_tokens", "subgraphs", "report", "padding", "aliasing", "reasons", "calls", "generation", "backend"]
LARGER += ["families", "fuzz"]
TESTS = [f"tests/test_{name}.py" for name in (*SUBJECTS, *LARGER)]

OTHER: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place, each with a name."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp):
        ops = node.ops if isinstance(node, ast.Compare) else [node.op]
        for i, op in enumerate(ops):
            if type(op) in OTHER:
                other, new = OTHER[type(op)](), copy.copy(node)
                if isinstance(new, ast.Compare):
                    new.ops = [other if i == j else op for j, op in enumerate(ops)]
                else:
                    new.op = other
                yield f"{type(op).__name__} to {type(other).__name__}", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield f"{type(node.op).__name__} left out", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} to {not node.value}", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield f"{node.value} to {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        new = copy.copy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition negated", new
    elif isinstance(node, ast.comprehension):
        for i in range(len(node.ifs)):
            new = copy.copy(node)
            new.ifs = node.ifs[:i] + node.ifs[i + 1 :]
            yield "filter left out", new
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "None returned", ast.Return(ast.Constant(None))
    elif is_call or isinstance(node, ast.AugAssign | ast.Break | ast.Continue):
        yield "statement left out", ast.Pass()


def mutants(source: str) -> Iterator[tuple[int, int, str, ast.Module]]:
    """Line, column, what was changed, and the module, which has the change until the next is asked for.

    Annotations and calls of the log are left alone.
    """
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None), node)
        if isinstance(part, ast.AST) and (part is not node or ast.unparse(node).startswith(("log.", "log =")))
        for inner in ast.walk(part)
    }
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in skipped:
                    continue
                for what, new in variants(node):
                    at: Any = node if hasattr(node, "lineno") else node.target  # type: ignore[attr-defined]
                    ast.copy_location(new, at)  # type: ignore[type-var]
                    if isinstance(value, list):
                        value[i] = new
                    else:
                        setattr(parent, field, new)
                    yield at.lineno, at.col_offset, what, ast.fix_missing_locations(tree)
                    if isinstance(value, list):
                        value[i] = node
                    else:
                        setattr(parent, field, node)


# --- running tests ---------------------------------------------------------------------------------------------------


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a changed tree."""

    tree: ast.Module

    def get_code(self, fullname: str) -> Any:
        """Not from a cache."""
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class Finder:
    """Has one module loaded by a `Loader`."""

    def __init__(self, file: str, tree: ast.Module) -> None:
        self.path = str(ROOT / file)
        self.name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.loader = Loader(self.name, self.path)
        self.loader.tree = tree

    def find_spec(self, name: str, *_: Any) -> Any:
        """Of the changed module."""
        return importlib.util.spec_from_file_location(name, self.path, loader=self.loader) if name == self.name else None


class Recorder:
    """A plugin of pytest: which test runs which lines, and for how long."""

    def __init__(self, cover: Any) -> None:
        self.cover, self.seconds = cover, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Lines and seconds count for this test."""
        self.cover.switch_context(item.nodeid)
        begin = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - begin
        return result


def in_fork(work: Callable[[], int], limit: float) -> int:
    """What `work` gives in a process of its own; negative where that is ended, after so many seconds of computing."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit)))
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_tests(nodes: list[str], *plugins: Any) -> int:
    """pytest, up to the first failure."""
    return int(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:benchmark", *nodes], list(plugins)))


def measure(path: Path, tests: list[str]) -> int:
    """Run the tests once and write down, for each line of FILES, the tests that run it, the quickest first."""
    cover = coverage.Coverage(data_file=None, include=[str(ROOT / file) for file in FILES], config_file=False)
    cover.start()
    recorder = Recorder(cover)
    code = run_tests(tests, recorder)
    cover.stop()
    data = cover.get_data()
    lines = {file: data.contexts_by_lineno(str(ROOT / file)) for file in FILES}
    path.write_text(json.dumps({"seconds": recorder.seconds, "lines": lines, "code": code}))
    return code


def main() -> None:
    """Measure, then go through the mutants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random; else all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="TEST", help="those that may notice")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of tests for one mutant")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    assert "simba_compile" not in sys.modules
    table = given.results.with_suffix(".lines.json")
    if not table.exists():
        assert in_fork(lambda: measure(table, given.tests), 10**5) == 0, "the tests do not pass"
    measured = json.loads(table.read_text())
    seconds: dict[str, float] = measured["seconds"]
    sources = {file: (ROOT / file).read_text() for file in given.files}
    every = [(file, i) for file, source in sources.items() for i, _ in enumerate(mutants(source))]
    chosen = set(every if given.sample is None else random.Random(given.seed).sample(every, given.sample))
    done = set()
    if given.results.exists():
        done = {tuple(json.loads(line)["mutant"]) for line in given.results.read_text().splitlines()}
    for file, source in sources.items():
        for i, (line, column, what, tree) in enumerate(mutants(source)):
            if (file, i) not in chosen - done:
                continue
            covering = measured["lines"][file].get(str(line), [])
            nodes = sorted(seconds if "" in covering else covering, key=seconds.__getitem__)
            totals = itertools.accumulate(seconds[node] for node in nodes)
            few = [node for node, total in zip(nodes, totals, strict=True) if total <= given.limit]

            def work(few: list[str] = few, file: str = file, tree: ast.Module = tree) -> int:
                sys.meta_path.insert(0, Finder(file, tree))
                return run_tests(few)

            begin = time.monotonic()
            code = in_fork(work, 3 * given.limit + 60) if few else 0
            outcome = "too slow" if code < 0 else "killed" if code else "survived" if few else "not run"
            entry = {"mutant": (file, i), "place": f"{file}:{line}:{column + 1}", "what": what, "outcome": outcome}
            entry |= {"tests": len(few), "of": len(nodes), "seconds": round(time.monotonic() - begin, 1)}
            with given.results.open("a") as results:
                results.write(json.dumps(entry) + "\n")
    entries = [json.loads(line) for line in given.results.read_text().splitlines()]
    outcomes = collections.Counter(entry["outcome"] for entry in entries)
    print(f"{len(every)} mutants, {len(entries)} of them tried: {dict(outcomes)}")
    for entry in entries:
        if entry["outcome"] != "killed":
            print("{outcome}: {place} {what} ({tests} of {of} tests)".format(**entry))


if __name__ == "__main__":
    main()
