"""Does the jobs of ``simba bench --device cuda``, in a process that may die of one: `bench_gpu` then starts another.

Takes the device and the number of runs as arguments, says what machine it is on, then reads jobs from its standard input and
answers each, all as one JSON object a line: ``{"machine": ...}``, then ``{"result": ...}`` or ``{"failed": ...}``. With
``"over": true`` beside the latter it ends, for the failure has left it unable to do anything else.
"""

import functools
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from simba_compile.cli import bench_kernels, models
from simba_compile.cli.bench import PROMPT_BEFORE_DECODING, SCORING
from simba_compile.cli.bench_gpu import GRAPH, HF, INDUCTOR, INNER, MAMBA_SSM, REDUCED, keep_of
from simba_compile.cli.device import RANGE, Device

AGREE_TOKENS, AGREE = 300, 1e-3  # how far float32 may be off, as a share of the largest logit
RUNS_ALIKE = 8  # of an operator, to the last bit
TRACE = 4000  # characters of a failure's trace that are kept: its end says where it was


class Worker:
    """Does jobs; keeps the model of the last one, and what was compiled of it.

    Parameters
    ----------
    device : Device
    runs : int
        Of each contender.
    """

    def __init__(self, device: Device, runs: int) -> None:
        self.device, self.runs = device, runs
        self.made: tuple[dict[str, Any], PreTrainedModel] | None = None
        self.compiled: tuple[str, Callable[..., Any]] | None = None

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """One job, by its kind."""
        with torch.no_grad():
            return getattr(self, job["kind"])(**{name: value for name, value in job.items() if name != "kind"})

    def copy(self, megabytes: int) -> dict[str, Any]:
        """The bandwidth of the device's memory."""
        return {"rate": bench_kernels.copy_bandwidth(self.device, megabytes)}

    def correct(self, operator: str, dtype: str, **shape: int) -> dict[str, Any]:
        """One operator against float64, and against itself in a second run."""
        return _judged(bench_kernels.error(operator, self.device, dtype, shape, RUNS_ALIKE), bench_kernels.most(dtype))

    def far(self, operator: str, **shape: int) -> dict[str, Any]:
        """One operator where offsets take more than 32 bits."""
        return _judged(bench_kernels.far_error(operator, self.device, shape), bench_kernels.most("bfloat16"))

    def agree(self, contender: str) -> dict[str, Any]:
        """A small pruned model in float32 against what it gives on the CPU, in one of the ways to run it on the device.

        A prompt, and a step that goes on from it.
        """
        ids, model = models.random_ids(models.TINY["vocab_size"], AGREE_TOKENS), models.random_mamba(4, models.TINY)
        options: dict[str, Any] = {"keep": 0.3}
        torch._dynamo.reset()
        expected = _prompt_and_step(torch.compile(model, backend="simba", options=options), ids)
        model, ids = model.to(self.device.name), ids.to(self.device.name)  # type: ignore[arg-type]
        torch._dynamo.reset()
        if contender in (INNER, REDUCED):
            options["inner"] = "inductor"
        forward = torch.compile(model, backend="simba", options=options)
        made: list[Tensor] = []

        def call() -> None:
            made[:] = _prompt_and_step(forward, ids)

        graphs = {"triton.cudagraphs": contender == REDUCED, "triton.cudagraph_or_error": contender == REDUCED}
        with torch._inductor.config.patch(graphs):  # or error: else Inductor only warns where it records none
            for _ in range(3):  # a graph of Inductor's is recorded in the second call
                call()
        replay = self.device.captured(call) if contender == GRAPH else self.device.wait
        replay()
        self.compiled = None  # the reset lost it
        return _judged(bench_kernels.off(list(zip(made, expected, strict=True))), AGREE)

    def kernel(self, operator: str, **shape: int) -> dict[str, Any]:
        """One operator's time."""
        return bench_kernels.measure(operator, self.device, shape, self.runs)

    def prefill(self, contender: str, model: dict[str, Any], tokens: int) -> dict[str, Any]:
        """A prompt, up to the next token's logits: a first call that compiles, runs, and growth of the memory."""
        before = self.compiled
        forward = self._forward(contender, model)
        compiles = contender != HF and self.compiled is not before  # else it was compiled for another length
        call = functools.partial(forward, self._ids(model, tokens), use_cache=False, logits_to_keep=1)
        first = self.device.seconds(call)
        memory = self.device.peak_mib(call)
        if GRAPH in contender:
            call = self.device.captured(call)  # type: ignore[assignment]
            call()
        timing = self.device.time(call, self.runs, 5.0)
        return {"timing": timing.to_dict(), "first": first if compiles else None, "memory_mib": memory}

    def decode(self, contender: str, model: dict[str, Any]) -> dict[str, Any]:
        """One decoding step as a CUDA graph; mamba-ssm's by its own loop, which captures one, too."""
        if contender == MAMBA_SSM:
            return {"timing": self._mamba_ssm_loop(model).to_dict()}
        ids = self._ids(model, PROMPT_BEFORE_DECODING)
        cache = models.going_on(self._model(model)(ids, use_cache=True))
        forward = self._forward(contender, model)
        call = functools.partial(forward, ids[:, -1:], **cache, use_cache=True)
        call()
        step = self.device.captured(call)
        step()
        return {"timing": self.device.time(step, self.runs, 3.0).to_dict()}

    def profile(self, contender: str, model: dict[str, Any], tokens: int) -> dict[str, Any]:
        """What the score, the selection and the gathers take of a pruned prompt, and where the host waits for the device."""
        forward = self._forward(contender, model)
        call = functools.partial(forward, self._ids(model, tokens), use_cache=False, logits_to_keep=1)
        call()
        times, waits = self.device.profiled(call)
        shares = {name: times.get(f"simba::{name}", 0.0) / times[RANGE] for name in SCORING}
        return {"shares": shares, "share": sum(shares.values()), "waits": waits}

    def _model(self, sizes: dict[str, Any]) -> PreTrainedModel:
        if self.made is None or self.made[0] != sizes:
            self.made = self.compiled = None
            self.device.free()
            torch.manual_seed(0)
            with self.device.on():
                self.made = sizes, MambaForCausalLM(MambaConfig(**sizes)).eval().to(torch.bfloat16)
        return self.made[1]

    def _forward(self, contender: str, sizes: dict[str, Any]) -> Callable[..., Any]:
        """The model as this contender runs it."""
        model, name = self._model(sizes), contender.removesuffix(f", {GRAPH}")
        if name == HF:
            return model
        if self.compiled is None or self.compiled[0] != name:
            torch._dynamo.reset()
            if name == INDUCTOR:  # its best case: code for this length alone
                self.compiled = name, torch.compile(model, backend="inductor", dynamic=False)
            else:
                options: dict[str, Any] = {"keep": keep_of(name), "inner": "inductor" if name.endswith(INNER) else "auto"}
                self.compiled = name, torch.compile(model, backend="simba", options=options)
        return self.compiled[1]

    def _ids(self, sizes: dict[str, Any], tokens: int) -> Tensor:
        return models.random_ids(sizes["vocab_size"], tokens).to(self.device.name)

    def _mamba_ssm_loop(self, sizes: dict[str, Any]) -> Any:
        """mamba-ssm's own generation: one token's share of what 64 more tokens take."""
        from mamba_ssm.models.config_mamba import MambaConfig as Config
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        config = Config(d_model=sizes["hidden_size"], n_layer=sizes["num_hidden_layers"], vocab_size=sizes["vocab_size"])
        model = MambaLMHeadModel(config, device=self.device.name, dtype=torch.bfloat16)
        ids = self._ids(sizes, PROMPT_BEFORE_DECODING)

        def generate(more: int) -> None:
            model.generate(ids, max_length=ids.shape[1] + more, cg=True, top_k=1)

        for more in (32, 96):
            generate(more)
        short, long = (self.device.time(functools.partial(generate, more), self.runs, 5.0) for more in (32, 96))
        return type(short)(tuple((b - a) / 64 for a, b in zip(sorted(short.runs), sorted(long.runs), strict=False)))


def _prompt_and_step(forward: Callable[..., Any], ids: Tensor) -> list[Tensor]:
    """The logits of both."""
    prompt = forward(ids, use_cache=True)
    step = forward(ids[:, -1:], **models.going_on(prompt), use_cache=True)
    return [prompt.logits, step.logits]


def _judged(error: float, most: float) -> dict[str, Any]:
    return {"error": min(error, sys.float_info.max), "right": error <= most}  # JSON has no infinity


def main(device: str, runs: int) -> None:
    """Do what is asked, line by line."""
    models.quiet()
    warnings.filterwarnings("ignore")
    logging.getLogger("simba_compile").setLevel(logging.ERROR)
    worker = Worker(Device(device), runs)
    print(json.dumps({"machine": worker.device.describe()}), flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"result": worker.do(json.loads(line))}
        except Exception as error:  # the next one may well run
            answer = {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
            answer["trace"] = traceback.format_exc()[-TRACE:]
        if ("failed" in answer or worker.device.lost) and not worker.device.is_usable():
            answer["over"] = True
        print(json.dumps(answer), flush=True)
        if "over" in answer:
            return
        if "failed" in answer:
            worker.compiled = None  # it may not have been compiled to its end
            worker.device.free()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
