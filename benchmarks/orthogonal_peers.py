"""Other people's orthogonal maps, and the page of plain torch anybody could write: functions from x to Q."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parametrizations

Map = Callable[[Tensor], Tensor]


def by_torch(name: str) -> Map:
    """A map of torch.nn.utils.parametrizations.orthogonal, without its base."""
    kind = getattr(parametrizations._OrthMaps, name)
    return lambda x: parametrizations._Orthogonal(x, kind, use_trivialization=False)(x)


def by_qr(x: Tensor) -> Tensor:
    """Another map, and the honest rival: two lines."""
    return torch.linalg.qr(x)[0]


def in_float32(map: Map) -> Map:
    """What anybody would write for 16-bit weights, which LAPACK does not take; nothing for others."""
    return lambda x: map(x.float()).to(x.dtype) if x.dtype in (torch.bfloat16, torch.float16) else map(x)


def by_geotorch() -> Map | None:
    """The Cayley map of geotorch times its base, an identity here; None where it is not installed."""
    if importlib.util.find_spec("geotorch") is None:
        return None
    import geotorch

    made: dict[tuple, torch.nn.Module] = {}

    def run(x: Tensor) -> Tensor:
        key = (x.shape, x.dtype)
        if key not in made:
            kind = geotorch.SO if x.shape[-1] == x.shape[-2] else geotorch.Stiefel
            made[key] = kind(x.size(), triv="cayley").to(x.device, x.dtype)
            base = made[key].base  # random otherwise: float32 and float64 would compute different matrices
            base.copy_(torch.eye(*base.shape[-2:], dtype=x.dtype, device=x.device))
        return made[key](x)

    return run


def by_torch_householder() -> Map | None:
    """`torch_householder_orgqr`; None where it is not installed."""
    if importlib.util.find_spec("torch_householder") is None:
        return None
    from torch_householder import torch_householder_orgqr

    return torch_householder_orgqr


# ------------------------------------------------------------------------------------------------ one page of torch
class CayleyFormula(torch.autograd.Function):
    """The formulas of rom.ops.cayley, in library calls."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        k = x.shape[-1]
        lower, below = x[..., :k, :].tril(), x[..., k:, :]
        kernel = below.mT @ below / 4 - (lower - lower.mT) / 2
        kernel.diagonal(dim1=-2, dim2=-1).add_(1)
        inverse = torch.linalg.inv(kernel)
        top = 2 * inverse
        top.diagonal(dim1=-2, dim2=-1).sub_(1)
        ctx.save_for_backward(below, inverse)
        return top if x.shape[-2] == k else torch.cat((top, below @ inverse), -2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        below, inverse = ctx.saved_tensors
        k = inverse.shape[-1]
        if grad.shape[-2] == k:
            kernel = inverse.mT @ grad @ inverse.mT
            return (kernel - kernel.mT).tril(-1)
        kernel = inverse.mT @ (2 * grad[..., :k, :] + below.mT @ grad[..., k:, :]) @ inverse.mT
        top = ((kernel - kernel.mT) / 2).tril(-1)
        return torch.cat((top, grad[..., k:, :] @ inverse.mT - below @ (kernel + kernel.mT) / 4), -2)


class HouseholderFormula(torch.autograd.Function):
    """The formulas of rom.ops.householder, in library calls."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        k = x.shape[-1]
        v = x.tril(-1)
        v.diagonal(dim1=-2, dim2=-1).fill_(1)
        upper = (v.mT @ v).triu()
        upper.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        z = torch.linalg.solve_triangular(upper, v[..., :k, :].mT, upper=True)
        q = -(v @ z)
        q[..., :k, :].diagonal(dim1=-2, dim2=-1).add_(1)
        ctx.save_for_backward(v, upper, z)
        return q

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        v, upper, z = ctx.saved_tensors
        c = torch.linalg.solve_triangular(upper.mT, v.mT @ grad, upper=False)
        lower = (c @ z.mT).triu()
        out = v @ (lower + lower.triu(1).mT) - grad @ z.mT
        out[..., : z.shape[-1], :] -= c.mT
        return out.tril(-1)
