"""Every operator that computes something, in plain torch: the definition that the kernels are tested against.

Written to be read, in files as those of ``ops``. Correct for any floating dtype and any strides, and differentiable. Half
types are widened to float32 inside, as the kernels do. Channels are last throughout: ``x`` is (batch, token, channel).
"""

from simba_compile.kernels.reference.conv import causal_conv1d, causal_conv1d_backward, conv_update
from simba_compile.kernels.reference.dtypes import compute_dtype
from simba_compile.kernels.reference.linear import linear
from simba_compile.kernels.reference.mixer import mixer_update, ssd_mixer_update
from simba_compile.kernels.reference.norm import add_norm, gated_norm, rms_norm
from simba_compile.kernels.reference.scan import (
    POOLS,
    influence,
    scan_states,
    selective_scan,
    selective_scan_backward,
    state_update,
    step_size,
)
from simba_compile.kernels.reference.ssd import (
    ssd_influence,
    ssd_scan,
    ssd_scan_backward,
    ssd_state_update,
    ssd_states,
    ssd_step_size,
)
from simba_compile.kernels.reference.tokens import (
    CRITERIA,
    cache_entries,
    gather,
    is_marked,
    last_tokens,
    pool_heads,
    restore,
    scatter,
    select,
    token_scores,
)

__all__ = [
    "CRITERIA",
    "POOLS",
    "add_norm",
    "cache_entries",
    "causal_conv1d",
    "causal_conv1d_backward",
    "compute_dtype",
    "conv_update",
    "gated_norm",
    "gather",
    "influence",
    "is_marked",
    "last_tokens",
    "linear",
    "mixer_update",
    "pool_heads",
    "restore",
    "rms_norm",
    "scan_states",
    "scatter",
    "select",
    "selective_scan",
    "selective_scan_backward",
    "ssd_influence",
    "ssd_mixer_update",
    "ssd_scan",
    "ssd_scan_backward",
    "ssd_state_update",
    "ssd_states",
    "ssd_step_size",
    "state_update",
    "step_size",
    "token_scores",
]
