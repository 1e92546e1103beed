"""Room among Dynamo's compilations for all graphs of a model with mixers.

Dynamo compiles a function eight times, and runs what would be the ninth uncompiled. That function is not a model's own: all
models of transformers share the wrapper around their `forward`, and each model needs six graphs (a prompt and a step, of one
sequence, of several, and of several with padding). The ninth may be the step that goes on from a pruned prompt, and
uncompiled attention gives NaN for the marks in its cache. A model that is dense may not take the others' room, either: where
one comes to its limit, Dynamo compiles the function for no other. So the limit is raised for all: a model that is compiled
once the function has eight graphs would not reach the backend, which could raise it for that model.
"""

import sys
from types import FrameType

from torch._dynamo import config
from torch._dynamo.convert_frame import ConvertFrameAssert

ROOM = 64


def make_room() -> None:
    """Raise the limit, unless `torch.compile` was given one for what is being compiled now.

    Dynamo's own is of this thread. What is compiled now keeps its room in others; torch 2.11 has no such limit.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not ConvertFrameAssert.__call__.__code__:
        frame = frame.f_back
    if frame is None:  # it is not Dynamo that calls the backend
        return
    converter = frame.f_locals["self"]
    if getattr(converter, "_recompile_limit", None) is not None:
        return
    config.recompile_limit = max(config.recompile_limit, ROOM)
    if hasattr(converter, "_recompile_limit"):
        converter._recompile_limit = config.recompile_limit
