"""The trained testbeds and the scripts that train them, on tiny models."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "training"))

import corpus  # noqa: E402
import train_bytes  # noqa: E402
import train_recall  # noqa: E402

each_architecture = pytest.mark.parametrize("architecture", ["mamba", "mamba2"])


def recall_arguments(*arguments: object) -> argparse.Namespace:
    tiny = ("--d-model", 16, "--layers", 2, "--length", 24, "--pairs", 2, "--batch-tokens", 512)
    return train_recall.parse([str(each) for each in (*tiny, *arguments)])


@each_architecture
def test_training_lowers_the_loss_and_saves_what_it_scored(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_recall, "LENGTHS", (24,))
    args = recall_arguments("--architecture", architecture, "--steps", 20, "--log-steps", 10, "--output", tmp_path)
    train_recall.train(args)
    report = json.loads((tmp_path / "training.json").read_text())
    first, second = (point["loss"] for point in report["curve"])
    assert second < first
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.model_type == architecture
    assert report["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert report["accuracy"]["tokens_24"]["pairs_2"] == train_recall.accuracy(model, 24, 2, 512, seed=2)


@each_architecture
def test_every_parameter_is_trained_once(architecture: str) -> None:
    args = recall_arguments("--architecture", architecture)
    model = train_bytes.build_byte_model(args)
    optimizers = train_bytes.build_optimizers(model, args)
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted({id(p) for p in model.parameters()})


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 20, 8), (8, 20), (2, 5, 16, 16)):
        values = torch.linalg.svdvals(train_bytes.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3  # where the iteration's quintic leaves them


def test_held_out_files_are_not_trained_on() -> None:
    held_out = corpus.held_out_files() | corpus.drawn_files()
    assert set(held_out) >= set(corpus.HELD_OUT) and len(held_out) > len(corpus.HELD_OUT)
    for epoch in (0, 1):
        trained = corpus.training_files(epoch)
        assert set(held_out).isdisjoint(trained) and len(trained) > 300
        text = corpus.training_bytes(epoch)
        for content in held_out.values():
            assert len(content) < 200 or content not in text  # the sample has files that are empty, or one line


def test_a_stopped_stream_goes_on_where_it_was() -> None:
    stream = train_bytes.WindowStream(seed=3)
    stream.next(4, 512)
    again = train_bytes.WindowStream(**stream.place())
    assert torch.equal(stream.next(4, 512), again.next(4, 512))


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (REPOSITORY / "models").glob("*/config.json")))
def test_a_carried_model_is_small_and_says_how_it_was_trained(folder: str) -> None:
    folder_path = REPOSITORY / "models" / folder
    assert sum(path.stat().st_size for path in folder_path.iterdir()) <= 6_000_000
    report = json.loads((folder_path / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder_path)
    assert report["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert report["args"]["seed"] is not None and report["curve"]
