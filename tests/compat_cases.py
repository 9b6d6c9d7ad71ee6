"""The recurrences that the compatibility layer's functions stand for, step by step in float64."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(out, last state) for u, delta, z (batch, dim, length) and B, C (batch, groups, state, length)."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
    h, ys = u.new_zeros(u.shape[0], *A.shape).to(A.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + delta[:, :, t, None] * B[..., t] * u[:, :, t, None]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(ys, 2) + (0 if D is None else D[:, None] * u)
    return y if z is None else y * F.silu(z), h


def conv(x, weight, bias, before=None):
    """(batch, dim, length) with the inputs before it."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    return F.conv1d(torch.cat([before, x], 2), weight[:, None], bias, groups=x.shape[1])
