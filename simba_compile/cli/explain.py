"""``simba explain``: print what the backend does to a model."""

from typing import Any

import torch
import typer
from rich.console import Console

import simba_compile
from simba_compile.capture import InvalidOptions
from simba_compile.cli import models
from simba_compile.cli.show import told_of


def run(name: str, tokens: int, config_only: bool, given: dict[str, Any]) -> None:
    """See `simba_compile.cli.explain`."""
    with told_of():
        options = simba_compile.Options(**given)
    models.quiet()
    model = models.load(name, config_only)
    ids = models.random_ids(model.config.get_text_config().vocab_size, tokens)
    # The call that `generate` makes for a prompt, without its cache: only the last token's logits are asked for.
    try:
        with torch.no_grad():
            report = simba_compile.explain(model, ids, options=options, logits_to_keep=1, use_cache=False)
    except InvalidOptions as error:  # a list of shares that is not as long as the model has mixers
        raise typer.BadParameter(str(error)) from None
    Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
