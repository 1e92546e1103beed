"""Room among Dynamo's compilations for all graphs of a model with mixers.

Dynamo compiles a function eight times, and runs what would be the ninth uncompiled. That function is not a model's own: all
models of transformers share the wrapper around their `forward`, and each model needs six graphs (a prompt and a step, of one
sequence, of several, and of several with padding). The ninth may be the step that goes on from a pruned prompt, and
uncompiled attention gives NaN for the marks in its cache. A model that is dense may not take the others' room, either: where
one comes to its limit, Dynamo compiles the function for no other.
"""

import sys
from types import FrameType

from torch._dynamo import config
from torch._dynamo.convert_frame import ConvertFrameAssert

ROOM = 64


def make_room() -> None:
    """Raise the limit for what is being compiled now, unless `torch.compile` was given one; torch 2.11 has one for all."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not ConvertFrameAssert.__call__.__code__:
        frame = frame.f_back
    if frame is None:  # it is not Dynamo that calls the backend
        return
    converter = frame.f_locals["self"]
    if not hasattr(converter, "_recompile_limit"):
        config.recompile_limit = max(config.recompile_limit, ROOM)
    elif converter._recompile_limit is None:
        converter._recompile_limit = max(config.recompile_limit, ROOM)
