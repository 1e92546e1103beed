"""The Triton kernels for CUDA and ROCm, in files by what they compute: kernels, launchers, how a configuration is chosen.

A launcher has the name and the signature of its operator. Importing this package needs triton; `ops` does so when a tensor
on a GPU first asks for it. float32, bfloat16 and float16 in and out, float32 inside; any strides.
"""

from collections.abc import Callable

from simba_compile.kernels.gpu import (
    conv,
    gather,
    influence,
    mixer,
    norm,
    scan,
    scan_backward,
    select,
    ssd,
    ssd_backward,
    ssd_influence,
    ssd_state,
    state,
)

KERNELS: dict[str, Callable] = {
    launcher.__name__: launcher
    for launcher in (
        influence.influence,
        ssd_influence.ssd_influence,
        select.select,
        gather.gather,
        scan.selective_scan,
        scan_backward.selective_scan_backward,
        ssd.ssd_scan,
        ssd_backward.ssd_scan_backward,
        conv.causal_conv1d,
        conv.causal_conv1d_backward,
        conv.conv_update,
        state.state_update,
        mixer.mixer_update,
        mixer.ssd_mixer_update,
        ssd_state.ssd_state_update,
        norm.rms_norm,
        norm.gated_norm,
        norm.add_norm,
    )
}
