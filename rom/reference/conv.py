"""Causal depthwise convolution and its decode step in plain torch: what the operators mean."""

from __future__ import annotations

from itertools import pairwise

import torch

# grad_x, grad_weight, grad_bias, grad_initial_state
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `rom.ops.causal_conv1d`."""
    outs, states = [], []
    for window in windows(x, weight, initial_state, cu_seqlens, row_index):
        pre = before_activation(window, weight, bias)
        outs.append(torch.nn.functional.silu(pre) if activation else pre)
        states.append(window[:, window.shape[1] - weight.shape[1] :].transpose(1, 2))
    out = torch.cat(outs, 1).to(x.dtype)
    return (out, torch.cat(states, 0)) if return_final_state else out


def windows(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Per sequence, the `width` inputs before its start followed by its own: `[batch, width + length, dim]`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(compute) if row_index is None else x.to(compute)[row_index.long()].sum(-2)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        count = x.shape[0] if cu_seqlens is None else len(bounds) - 1
        initial_state = x.new_zeros(count, *weight.shape)
    before = initial_state.to(compute).transpose(1, 2)
    if cu_seqlens is None:
        return [torch.cat([before, x], 1)]
    return [torch.cat([before[i : i + 1], x[:, a:b]], 1) for i, (a, b) in enumerate(pairwise(bounds))]


def before_activation(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The sum over the taps; the last one weighs the current input, the window's first input is never used."""
    width = weight.shape[1]
    steps = window.shape[1] - width
    pre = window[:, width:] * 0 if bias is None else bias.to(window).expand(window.shape[0], steps, -1)
    for k in range(width):
        pre = pre + window[:, 1 + k : 1 + k + steps] * weight[:, k].to(window)
    return pre


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rom.ops.causal_conv1d_update`."""
    steps = x if x.dim() == 3 else x.unsqueeze(1)
    slots = torch.arange(x.shape[0], device=x.device) if state_indices is None else state_indices.long()
    used = (slots >= 0).nonzero().squeeze(1)
    out = torch.zeros_like(steps)
    out[used], state = causal_conv1d(
        steps[used], weight, bias, activation, conv_state[slots[used]], return_final_state=True
    )
    conv_state[slots[used]] = state.to(conv_state.dtype)
    return out.view(x.shape)


def causal_conv1d_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    row_index: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_final: torch.Tensor | None,
) -> Grads:
    """The gradients by hand; that of the weight and bias in the compute dtype."""
    width, start, grads = weight.shape[1], 0, []
    all_windows = windows(x, weight, initial_state, cu_seqlens, row_index)
    grad_weight = all_windows[0].new_zeros(weight.shape)
    grad_bias = all_windows[0].new_zeros(weight.shape[0])
    for i, window in enumerate(all_windows):
        steps = window.shape[1] - width
        g = grad_out[:, start : start + steps].to(window)
        if activation:
            pre = before_activation(window, weight, bias)
            gate = torch.sigmoid(pre)
            g = g * gate * (1 + pre * (1 - gate))
        grad = torch.zeros_like(window)
        for k in range(width):
            grad[:, 1 + k : 1 + k + steps] += g * weight[:, k].to(g)
            grad_weight[:, k] += (g * window[:, 1 + k : 1 + k + steps]).sum((0, 1))
        grad_bias += g.sum((0, 1))
        if grad_final is not None:
            mine = grad_final if cu_seqlens is None else grad_final[i : i + 1]
            grad[:, steps:] += mine.to(g).transpose(1, 2)
        grads.append(grad)
        start += steps
    grad_x = torch.cat([grad[:, width:] for grad in grads], 1).to(x.dtype)
    if row_index is not None:
        rows = torch.empty_like(x)
        rows[row_index.long()] = grad_x.unsqueeze(-2).expand(*row_index.shape, -1)
        grad_x = rows
    return grad_x, grad_weight, grad_bias, torch.cat([grad[:, :width].transpose(1, 2) for grad in grads], 0)
