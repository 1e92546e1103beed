"""`simba eval`: its tasks, its grid, its file and its search, on models and objectives whose answer is known."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from simba_compile.analysis import budget, recall
from simba_compile.analysis.evaluation import DENSE, Records, equal_flops, evaluate, grid
from simba_compile.analysis.tasks import RecallTask, Text, TextTask, read_text
from simba_compile.analysis.variants import Variants
from simba_compile.cli import app
from simba_compile.options import Options


class Oracle:
    """Stands for `Variants`: recalls what is planted, if the setting is dense, and else guesses; counts its runs."""

    def __init__(self) -> None:
        self.runs: list[Options] = []

    def logits(self, options: Options, ids: Tensor, last: int) -> Any:
        self.runs.append(options)
        logits = torch.zeros(len(ids), last, recall.VOCABULARY)
        at = (ids[:, :-1] == ids[:, -1:]).long().argmax(1)
        logits[torch.arange(len(ids)), -1, ids[torch.arange(len(ids)), at + 1]] = 1.0 if options.keep == 1 else -1.0
        yield logits

    def flops(self, tokens: int) -> tuple[int, int]:
        return 100, 50


# --- recall ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 5), st.data())
def test_sequences_hold_what_they_ask_for(pairs: int, more: int, seed: int, data: st.DataObject) -> None:
    queries, tokens = data.draw(st.integers(1, pairs)), 2 * pairs + 2 + more
    window = data.draw(st.none() | st.integers(2 * pairs, tokens + 5))
    generator = torch.Generator().manual_seed(seed)
    ids, answers = recall.sequences(3, tokens, pairs, generator, queries, window)
    assert ids.shape == (3, tokens + 3 * (queries - 1))
    assert answers.shape == (3, queries)
    for row, wanted in zip(ids.tolist(), answers.tolist(), strict=True):
        context = row[: tokens - 2]
        places = [i for i, token in enumerate(context) if token in recall.KEYS]
        assert len(places) == len({context[i] for i in places}) == pairs
        value = {context[i]: context[i + 1] for i in places}
        assert sum(token in recall.NOISE for token in context) == len(context) - 2 * pairs
        assert window is None or min(places) >= max(0, len(context) - window)
        for i, answer in enumerate(wanted):
            marker, key = row[tokens - 2 + 3 * i : tokens + 3 * i]
            assert marker == recall.QUERY
            assert value[key] == answer
            assert i == queries - 1 or row[tokens + 3 * i] == answer
        assert len({row[tokens - 1 + 3 * i] for i in range(queries)}) == queries


def test_sequences_that_do_not_fit() -> None:
    for tokens, pairs, queries in ((10, 5, 1), (200, 17, 1), (50, 2, 3), (50, 0, 0)):
        with pytest.raises(ValueError, match="pairs"):
            recall.sequences(1, tokens, pairs, torch.Generator(), queries)


def test_recall_is_scored_by_its_answer() -> None:
    task = RecallTask(pairs=3, sequences=20)
    ids, targets = task.inputs(50)
    assert torch.equal(ids, task.inputs(50)[0])
    [logits] = Oracle().logits(DENSE, ids, 1)
    assert task.values(logits, targets) == [1.0] * 20
    [logits] = Oracle().logits(Options(), ids, 1)
    assert sum(task.values(logits, targets)) == 0


# --- text ------------------------------------------------------------------------------------------------------------


def text_of(tokens: int, each: int = 1) -> Text:
    return Text("counted", torch.arange(tokens), torch.full((tokens,), each))


def test_every_length_is_scored_on_the_same_tokens() -> None:
    task = TextTask(text_of(500), windows=5, last=4, longest=100)
    long, wanted = task.inputs(100)
    short, same = task.inputs(30)
    assert torch.equal(wanted, same)
    assert torch.equal(long[:, -30:], short)
    assert torch.equal(short[:, -3:], wanted[:, :-1])  # the last token is predicted, and not read
    assert (long[0, 0], wanted[-1, -1]) == (0, 499)


def test_bits_per_byte() -> None:
    task = TextTask(text_of(500, each=3), windows=5, last=4, longest=100)
    _, targets = task.inputs(100)
    even = torch.zeros(5, 4, 500)
    assert task.values(even, targets) == pytest.approx([math.log2(500) / 3] * 5)
    assert task.perplexity(math.log2(500) / 3) == pytest.approx(500)
    sure = even.scatter(2, targets[..., None], 100.0)
    assert task.values(sure, targets) == pytest.approx([0.0] * 5, abs=1e-6)


def test_halves_have_nothing_in_common() -> None:
    first, second = text_of(101).halves()
    assert torch.equal(torch.cat([first.ids, second.ids]), torch.arange(101))
    with pytest.raises(ValueError, match="too few"):
        TextTask(first, windows=2, last=4, longest=50)


def test_a_model_with_a_tokenizer_reads_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "ab": 1, "äb": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    (tmp_path / "text").write_text("ab äb ab", encoding="utf-8")
    read = read_text([tmp_path / "text"], str(tmp_path), 3)
    assert read.ids.tolist() == [1, 2, 1]
    assert read.bytes.tolist() == [2, 3, 2]
    as_bytes = read_text([tmp_path / "text"], "none", 256)
    assert bytes(as_bytes.ids.tolist()).decode() == "ab äb ab"


# --- the grid and the file -------------------------------------------------------------------------------------------


def test_a_text_that_cannot_be_cut_into_tokens_and_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the cat sat on the mat")
    with pytest.raises(ValueError, match="recall makes no tokens of text; is there one"):
        read_text([tmp_path / "text"], str(folder / "recall"), 50)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ByT5Tokenizer, does not say which bytes"):
        read_text([tmp_path / "text"], str(tmp_path), 384)


def test_the_grid_has_no_setting_twice() -> None:
    found = grid({"keep": [1.0, 0.5], "criterion": ["influence", "random", "recent"], "pool": ["max", "l2"], "seed": [0, 1]})
    assert found[0] == DENSE
    assert len(found) == len(set(found)) == 1 + 2 + 2 + 1  # two pools; two seeds; recent
    with pytest.raises(ValueError, match="did you mean 'influence'"):
        grid({"criterion": ["influenc"]})


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    path, task = tmp_path / "folder" / "records.jsonl", RecallTask(pairs=2, sequences=30)
    settings = grid({"keep": [0.5, 0.3]})
    oracle = Oracle()
    first = evaluate(oracle, "oracle", task, [40, 60], settings[:2], Records(path))
    assert len(oracle.runs) == 4
    with path.open("a") as file:
        file.write('{"of": {"model"')  # the run was stopped while it wrote
    oracle = Oracle()
    again = evaluate(oracle, "oracle", task, [40, 60], settings, Records(path))
    assert oracle.runs == [settings[2]] * 2  # only what was not there
    assert again[:4] == [json.loads(json.dumps(result), object_hook=_tuples) for result in first]
    assert len(path.read_text().splitlines()) == 6
    other = evaluate(oracle, "oracle", dataclasses.replace(task, pairs=3), [40], settings[:1], Records(path))
    assert len(oracle.runs) == 3  # another task is not the same
    assert other[0]["mean"] == 1


def test_what_is_no_record_is_left_as_it_is(tmp_path: Path) -> None:
    record = '{"of": {"x": 1}, "mean": 2.0}\n'
    for name, content in {
        "text": b"# A page of somebody's\n",
        "other lines": b"3\n" + record.encode(),
        "another object": b'{"x": 1}',
        "no text": bytes(range(256)),
        "a line of somebody's at the end": record.encode() + b"the end\n",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no result of simba eval"):
            Records(path)
        assert path.read_bytes() == content
    for cut_off in ('{"', record[:-2], ""):
        path = tmp_path / "cut off"
        path.write_text(record + cut_off)
        assert Records(path).get({"x": 1}) == {"of": {"x": 1}, "mean": 2.0}
        assert path.read_text() == record


def test_whole_results_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped while it starts would leave half of them."""
    path = tmp_path / "results.jsonl"
    path.write_text('{"of": {"x": 1}, "mean": 2.0}\n')
    monkeypatch.setattr(Path, "write_text", None)
    Records(path)
    monkeypatch.undo()
    path.write_text(path.read_text().rstrip())  # without its line's end, which the next record would go on
    Records(path).add({"of": {"x": 2}, "mean": 3.0})
    assert Records(path).get({"x": 1}) and Records(path).get({"x": 2})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return record | ({"difference": tuple(record["difference"])} if "difference" in record else {})


def test_results_are_compared_with_the_first_setting(tmp_path: Path) -> None:
    task = RecallTask(pairs=2, sequences=30)
    dense, pruned = evaluate(Oracle(), "oracle", task, [40], grid({"keep": [0.5]}), Records(tmp_path / "r.jsonl"))
    assert (dense["mean"], pruned["mean"]) == (1, 0)
    assert dense["difference"] == (0, 0, 0)
    assert pruned["difference"] == (-1, -1, -1)
    assert pruned["interval"][1] < 0.2 < 0.8 < dense["interval"][0]
    assert pruned["share"] == 0.5


# --- a model of random weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two sizes for each task, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    for name, vocabulary, hidden in (("bytes", 256, 32), ("recall", 64, 32), ("small", 64, 28)):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=3, state_size=4)
        MambaForCausalLM(config).save_pretrained(folder / name)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder / "no-mixer")
    (folder / "text").write_bytes(bytes(range(1, 201)) * 6)
    return folder


def simba(*arguments: object) -> Result:
    environment = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def test_equal_flops_are_equal(folder: Path) -> None:
    variants = Variants(MambaForCausalLM.from_pretrained(folder / "recall").eval())
    options = Options(keep=0.5, min_tokens=1)
    for _ in variants.logits(options, torch.ones(2, 400, dtype=torch.int64), 1):
        pass
    dense, _ = variants.flops(400)
    wanted = int(0.8 * dense)
    found = equal_flops(variants, options, 400, wanted)
    assert found is not None
    assert variants.share(found, 400) == pytest.approx(0.8, abs=0.005)
    assert equal_flops(variants, options, 400, dense // 100) is None


def test_eval_of_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.jsonl"
    arguments = ["eval", "--model", folder / "bytes", "--text", folder / "text", "--length", "50,100", "--windows", 4]
    arguments += ["--last", 8, "--keep", "0.5", "--criterion", "influence,recent", "--out", out]
    arguments += ["--plot", tmp_path / "eval.png"]
    result = simba(*arguments)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["of"]["tokens"] for record in records] == [50, 100] * 3
    assert [record["of"]["options"].get("criterion") for record in records] == [None] * 4 + ["recent"] * 2
    for record in records:
        assert len(record["values"]) == 4
        assert record["mean"] == pytest.approx(8, abs=1)  # random weights know nothing of bytes
        assert record["perplexity"] == pytest.approx(2 ** record["mean"])
    assert records[0]["share"] == 1 > records[3]["share"]
    assert "keep 0.5, criterion recent" in result.output
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    before = out.read_text()
    assert simba(*arguments).exit_code == 0
    assert out.read_text() == before


def test_eval_of_recall_against_a_smaller_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.jsonl"
    result = simba(
        *("eval", "--model", folder / "recall", "--task", "recall", "--length", 200, "--sequences", 5, "--pairs", "1,3"),
        *("--keep", 0.3, "--smaller", folder / "small", "--min-tokens", 4, "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("pruned minus smaller") == 2
    records = [json.loads(line) for line in out.read_text().splitlines()]
    small = [record for record in records if record["of"]["model"] == str(folder / "small")]
    assert len(small) == 2
    matched = [record for record in records if record["of"]["options"]["keep"] not in (1.0, 0.3)]
    assert [record["flops"] for record in matched] == pytest.approx([small[0]["flops"]] * 2, rel=0.02)


def test_eval_with_a_budget(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.jsonl"
    common = ("eval", "--model", folder / "bytes", "--text", folder / "text", "--windows", 3, "--last", 4, "--min-tokens", 4)
    result = simba(*common, "--length", 120, "--budget", 0.8, "--evaluations", 5, "--out", out)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    chosen = [record for record in records if "first half" in record["of"]["text"]]
    assert len(chosen) == 6  # linear, uniform, and four that the search asks for besides its start
    held_out = [record for record in records if "second half" in record["of"]["text"]]
    best = min(chosen, key=lambda record: record["mean"])
    linear, uniform, found, dense = (record["of"]["options"] for record in held_out)
    assert "schedule" not in linear
    assert uniform["schedule"] == "uniform"
    assert found["schedule"] == best["of"]["options"]["schedule"]
    assert dense == {"keep": 1.0}
    for record in (*chosen, *held_out[:3]):
        assert record["share"] == pytest.approx(0.8, abs=0.02)
    refused = simba(*common, "--length", 120, "--budget", 0.001, "--out", out)
    assert refused.exit_code == 2
    assert "schedules take between" in refused.output


def test_eval_says_what_is_wrong(folder: Path) -> None:
    def told(*arguments: object) -> str:
        result = simba("eval", "--out", folder / "none.jsonl", *arguments)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.replace("│", " ").split())

    assert "needs a file" in told("--model", folder / "bytes")
    assert "No such file" in told("--model", folder / "bytes", "--text", folder / "none")
    assert "too few" in told("--model", folder / "bytes", "--text", folder / "text", "--length", 5000)
    assert "vocabulary of 256" in told("--model", folder / "bytes", "--task", "recall")
    assert "0 is not at least 2" in told("--model", folder / "bytes", "--length", 0)
    assert "only names are compared" in told("--model", folder / "bytes", "--schedule", "0.5,0.3")
    assert "there is no such folder" in told("--model", "/nowhere")
    assert "9 pairs" in told("--model", folder / "recall", "--task", "recall", "--pairs", 9, "--length", 12)
    assert "no list of whole numbers" in told("--model", folder / "recall", "--length", "1,x")
    assert "no list of numbers" in told("--model", folder / "recall", "--keep", "0.5,")
    assert "suffix is none of" in told("--model", folder / "bytes", "--text", folder / "text", "--plot", folder / "x.doc")
    (folder / "empty").touch()
    for more in ((), ("--budget", 0.8)):
        assert "empty is empty" in told("--model", folder / "bytes", "--text", folder / "empty", *more)
    assert "goes with --task recall" in told("--model", folder / "bytes", "--text", folder / "text", "--within", 5)
    assert "there is no such folder" in told("--model", "nowhere/")
    assert "must be one of" in told("--model", folder / "recall", "--pool", "mean")
    assert "cannot be loaded" in told("--model", folder / "nothing")
    on_text = ("--model", folder / "bytes", "--text", folder / "text", "--length", 50)
    assert "they read different tokens" in told(*on_text, "--smaller", folder / "small")
    assert "cannot be loaded" in told(*on_text, "--smaller", folder / "nothing")
    assert "nothing is pruned at 20 tokens" in told(
        *("--model", folder / "bytes", "--text", folder / "text", "--length", 20, "--last", 4, "--budget", 0.8)
    )
    assert "has no mixer" in told("--model", folder / "no-mixer", "--text", folder / "text", "--length", 20, "--last", 4)
    assert "--every has several" in told(*on_text, "--smaller", folder / "bytes", "--every", "1,2")
    assert "--min-tokens has several" in told(*on_text, "--budget", 0.8, "--min-tokens", "4,8")
    assert "--length has several" in told("--model", folder / "bytes", "--budget", 0.8, "--length", "50,60")
    assert "nan is no share" in told(*on_text, "--budget", "nan")
    assert "without --task recall, --smaller" in told(
        *("--model", folder / "recall", "--task", "recall", "--budget", 0.8, "--smaller", folder / "small")
    )
    assert "is no result of simba eval" in told(*on_text, "--out", folder / "text")
    assert "Is a directory" in told(*on_text, "--out", folder)


# --- the search ------------------------------------------------------------------------------------------------------


def mean_share(shares: budget.Shares) -> float:
    return sum(shares) / len(shares)


LINEAR = (1.0, 0.8, 0.6, 0.4, 0.2)


def test_the_search_finds_which_layer_matters() -> None:
    def objective(shares: budget.Shares) -> float:
        return (1 - shares[2]) ** 2 + 0.01 * (1 - shares[4])

    best, score = budget.search(objective, mean_share, LINEAR, 0.6, 200)
    assert best[2] > 0.9  # which is all that a budget of 0.6 has: the layers before it must have as many
    assert score < objective(LINEAR) / 10
    assert mean_share(best) <= 0.6 + 1e-3


@given(st.lists(st.floats(0.05, 5), min_size=5, max_size=5), st.integers(1, 30))
def test_the_search_is_never_worse_than_its_start(weights: list[float], evaluations: int) -> None:
    asked: list[budget.Shares] = []

    def objective(shares: budget.Shares) -> float:
        asked.append(shares)
        return sum(weight * (1 - share) for weight, share in zip(weights, shares, strict=True))

    best, score = budget.search(objective, mean_share, LINEAR, 0.6, evaluations)
    assert asked[0] == LINEAR
    assert len(asked) <= evaluations
    assert len(set(asked)) == len(asked)
    assert score == min(objective(shares) for shares in asked[:evaluations]) == objective(best)
    for shares in asked:
        assert list(shares) == sorted(shares, reverse=True)
        assert mean_share(shares) <= 0.6 + 1e-3
        Options(schedule=shares)


def test_a_start_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.600 of the FLOPs; the budget is 0\.5"):
        budget.search(mean_share, mean_share, LINEAR, 0.5, 10)


def test_records_of_another_file_are_their_own(tmp_path: Path) -> None:
    records = Records(tmp_path / "a.jsonl")
    records.add({"of": {"x": 1}, "mean": 2.0})
    assert Records(tmp_path / "a.jsonl").get({"x": 1}) == {"of": {"x": 1}, "mean": 2.0}
    assert Records(tmp_path / "b.jsonl").get({"x": 1}) is None


def test_a_plot_tells_settings_apart() -> None:
    """Options that differ have lines of their own, with names where a value may be another option's."""
    from matplotlib.figure import Figure

    from simba_compile.analysis import plots

    every: list[dict[str, Any]] = [{"keep": keep, "min_tokens": least} for least in (8, 16) for keep in (0.3, 0.1)]
    every += [{"keep": 0.1, "every": 2, "min_tokens": 8}, {"keep": 0.1, "protect_first": 2, "min_tokens": 8}]
    every += [{"keep": 0.1, "criterion": "recent", "min_tokens": 8}]
    some = {"difference": [0.1, 0.0, 0.2], "unit": "bits per byte"}
    axes = Figure().subplots()
    plots._keeps(axes, [{"of": {"options": options}, **some} for options in every])
    assert axes.get_legend_handles_labels()[1] == [
        *("min_tokens 8", "min_tokens 16", "every 2, min_tokens 8", "protect_first 2, min_tokens 8"),
        "recent, min_tokens 8",
    ]
    plots._keeps(axes := Figure().subplots(), [{"of": {"options": {"keep": 0.1, "min_tokens": 8}}, **some}])
    assert axes.get_legend_handles_labels()[1] == ["influence"]
