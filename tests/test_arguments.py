"""Arguments that are given by name, or under NumPy's names: calls mean the same, and are read as those by place are."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from toys import HIDDEN, OPS, WIDTH, Captured, matrix, tokens, toys

from simba_compile import Options
from simba_compile.passes import transform
from simba_compile.passes.arguments import name_calls, place_arguments
from simba_compile.passes.length import Length, value_of
from simba_compile.passes.match import match

layer, last = toys(2)
weight = torch.rand(HIDDEN) + 0.5
Function = Callable[[Tensor], Tensor]
NAMED: dict[str, tuple[Function, Function]] = {  # a call by names, and the same by place
    "linear": (lambda h: F.linear(input=h, weight=matrix), lambda h: F.linear(h, matrix)),
    "linear with a bias": (lambda h: F.linear(h, weight=matrix, bias=weight), lambda h: F.linear(h, matrix, weight)),
    "layer norm": (
        lambda h: F.layer_norm(input=h, normalized_shape=(HIDDEN,), weight=weight),
        lambda h: F.layer_norm(h, (HIDDEN,), weight=weight),
    ),
    "embedding": (
        lambda h: F.embedding(weight=matrix, input=h.argmax(-1)),
        lambda h: F.embedding(h.argmax(-1), matrix),
    ),
    "concatenation": (
        lambda h: torch.cat(tensors=[h, h], axis=-1)[..., :HIDDEN],
        lambda h: torch.cat([h, h], -1)[..., :HIDDEN],
    ),
    "stack": (lambda h: torch.stack([h, h.sin()], axis=2).sum(2), lambda h: torch.stack([h, h.sin()], 2).sum(2)),
    "transpose": (
        lambda h: torch.transpose(input=h, dim0=1, dim1=2).sin().transpose(dim0=1, dim1=2),
        lambda h: h.transpose(1, 2).sin().transpose(1, 2),
    ),
    "transpose by other names": (
        lambda h: torch.ops.aten.mT(torch.swapdims(h, dim0=1, dim1=2).sin().swapaxes(axis0=1, axis1=2).mT.cos()),
        lambda h: torch.transpose(h, 1, 2).sin().transpose(1, 2).transpose(-2, -1).cos().transpose(-2, -1),
    ),
    "permute": (
        lambda h: torch.permute(h, dims=(0, 2, 1)).sin().permute(dims=(0, 2, 1)),
        lambda h: h.permute((0, 2, 1)).sin().permute((0, 2, 1)),
    ),
    "in the shape of another": (
        lambda h: h[..., :1].expand_as(h) * torch.broadcast_to(h.mean(-1, keepdim=True), h.shape).view_as(h).reshape_as(h),
        lambda h: h[..., :1].expand(*h.shape) * h.mean(-1, keepdim=True).expand(h.shape).view(*h.shape).reshape(*h.shape),
    ),
    "channels moved": (
        lambda h: torch.roll(h, shifts=2, dims=2).flip(dims=(2,)),
        lambda h: torch.roll(h, 2, 2).flip((2,)),
    ),
    "product": (lambda h: torch.matmul(input=h, other=matrix), lambda h: torch.matmul(h, matrix)),
    "products of some ranks": (
        lambda h: torch.bmm(h, h.mT).bmm(h) + torch.mm(h.flatten(0, 1), matrix).mm(matrix).view(h.shape),
        lambda h: h.matmul(h.mT).matmul(h) + torch.matmul(h.flatten(0, 1), matrix).matmul(matrix).view(h.shape),
    ),
    "rows and a bias": (
        lambda h: torch.addmm(weight, h.flatten(0, 1), matrix).view(h.shape),
        lambda h: F.linear(h.flatten(0, 1), matrix.t(), weight).view(h.shape),
    ),
    "parts of complex numbers": (
        lambda h: torch.complex(h, h.sin()).real + torch.complex(h, h.cos()).imag,
        lambda h: torch.real(torch.complex(h, h.sin())) + torch.imag(torch.complex(h, h.cos())),
    ),
    "the larger and the smaller of two": (
        lambda h: torch.max(h, h.sin()).min(h.cos()),
        lambda h: torch.minimum(torch.maximum(h, h.sin()), h.cos()),
    ),
    "product by einsum": (
        lambda h: torch.einsum("bnd,ed->bne", torch.einsum("b n d, d e -> b n e", h, matrix), matrix),
        lambda h: torch.matmul(torch.matmul(h, matrix), matrix.transpose(-2, -1)),
    ),
    "arithmetic": (
        lambda h: torch.mul(h, other=torch.add(input=h, other=1).sub(other=2)),
        lambda h: torch.mul(h, torch.add(h, 1).sub(2)),
    ),
    "arithmetic by other names": (
        lambda h: torch.multiply(h, h.negative().subtract(other=2)).absolute().true_divide(torch.divide(h, 3).exp()),
        lambda h: torch.mul(h, h.neg().sub(2)).abs().div(torch.div(h, 3).exp()),
    ),
    "arithmetic in place": (
        lambda h: h.sin().multiply_(h).subtract_(h.cos()).absolute_(),
        lambda h: h.sin().mul_(h).sub_(h.cos()).abs_(),
    ),
    "by NumPy's names": (lambda h: torch.mul(x1=torch.exp(a=h), x2=torch.sqrt(x=h.abs())), lambda h: torch.mul(
        torch.exp(h), torch.sqrt(h.abs()))),
    "reshape": (
        lambda h: torch.reshape(input=h, shape=(h.shape[0], -1, 2, 3)).view(size=h.shape),
        lambda h: torch.reshape(h, (h.shape[0], -1, 2, 3)).view(h.shape),
    ),
    "chunks": (lambda h: h.chunk(2, axis=-1)[1].repeat(1, 1, 2), lambda h: h.chunk(2, -1)[1].repeat(1, 1, 2)),
    "norm": (
        lambda h: weight * (h * torch.rsqrt(input=torch.add(h.pow(exponent=2).mean(axis=-1, keepdims=True), other=1e-5))),
        lambda h: weight * (h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), 1e-5))),
    ),
    "along the tokens": (lambda h: h.sort(axis=1).values, lambda h: h.sort(1).values),
    "a choice": (
        lambda h: torch.where(condition=h > 0, input=h, other=h.sin()),
        lambda h: torch.where(h > 0, h, h.sin()),
    ),
}  # fmt: skip


def beside(h: Tensor, function: Function) -> Tensor:
    """A function of the stream, added to it."""
    return h + function(h)


@pytest.mark.parametrize("name", NAMED)
def test_names_and_places_mean_the_same(name: str) -> None:
    """Between two mixers: the same is pruned, the same is fused, and with everything kept the result is eager's."""
    called, results = [], []
    for function in NAMED[name]:
        captured = Captured(lambda h, function=function: last(beside(layer(h), function)), tokens())
        with torch.no_grad():
            result = transform(captured.gm, Options.from_mapping({"schedule": [0.6, 0.3], "min_tokens": 1}))
            assert result.pruned is not None and result.plan is not None
            counts = [20] * len(result.plan.pruning)
            torch.testing.assert_close(result.pruned(*captured.args, *counts)[0], captured.result, rtol=1e-4, atol=1e-5)
            results.append(result.pruned(*captured.args, *result.plan.inputs(20))[0])
        called.append([getattr(target, "__name__", target) for target in captured.targets(result.pruned)])
    assert sorted(called[0]) == sorted(called[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


EINSUMS = {  # and whether they are products of matrices
    **{"bid,bjd->bij": True, "bij,bjd->bid": True, "bid,de->bie": True, "id,de->ie": True},
    **{"bid,bjd->bji": True, "bij,bjd->bi": False, "bid,bjd->ij": False, "bid,bde->dbe": False, "id,bjd->bij": False},
    **{
        "bid,dbj->bij": True,
        "bqhd,bkhd->bhqk": True,
        "bhqk,bkhd->bqhd": True,
        "bii,bij->bij": False,
        "bid,bid->bid": False,
        "bid,cde->bie": False,
        "...d,de->...e": False,
    },
    **{"bid,d->bi": False, "bid,bde": False, "bid->bdi": False, "bid,dj,jk->bik": False, "bid,bdd->bid": False},
    **{"bij,bjj->bij": False, "bsd,bsd->bs": False},
}


@pytest.mark.parametrize(
    ("equation", "repeated"), [*((e, False) for e in EINSUMS), *((e, True) for e in EINSUMS if EINSUMS[e])]
)
def test_products_written_as_einsum(equation: str, repeated: bool) -> None:
    """Only those are written otherwise, and to the same result; where the sum is over an axis that one repeats, none is."""
    size = {letter: 5 + i for i, letter in enumerate(sorted(set(equation) & set(ascii_letters)))}
    given, _, out = equation.partition("->")
    terms = given.split(",")
    factors = [torch.randn([size.get(letter, 3) for letter in term.replace("...", "..")]) for term in terms]
    if repeated:
        (summed,) = set(terms[0]) & set(terms[1]) - set(out)
        factors[1] = factors[1].narrow(terms[1].index(summed), 0, 1)
    expected = torch.einsum(equation, *factors)
    graphs: list[GraphModule] = []
    torch.compile(lambda *given: torch.einsum(equation, *given), backend=lambda gm, _: graphs.append(gm) or gm)(*factors)
    (gm,) = graphs
    name_calls(gm.graph)
    gm.recompile()
    assert any(node.target is torch.matmul for node in gm.graph.nodes) is (EINSUMS[equation] and not repeated)
    torch.testing.assert_close(gm(*factors)[0], expected)


def test_operators_of_ours_by_name() -> None:
    def function(h: Tensor) -> Tensor:
        x = OPS.causal_conv1d(x=layer.in_proj(h)[..., :WIDTH], weight=layer.conv, bias=None, silu=True)
        B, C = layer.x_proj(x)[..., 2:].chunk(2, -1)
        y, _ = OPS.selective_scan(x=x, dt=x, A=layer.A, B=B, C=C, D=None, z=None, dt_bias=None, softplus=True, index=None)
        return h + layer.out_proj(y)

    captured = Captured(function, tokens())
    place_arguments(captured.gm.graph)
    (mixer,) = match(captured.gm.graph)
    assert mixer.reason is None and value_of(mixer.residual).shape[-1] == HIDDEN
    assert Length(mixer.x).is_symbolic
    captured.lowered()
