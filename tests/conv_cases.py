"""Random calls of causal_conv1d, and the comparison of one call with the float64 reference."""

import torch
from tolerance import assert_close

import rom
from rom.reference import conv as reference

NAMES = ("out", "final_state", "x.grad", "weight.grad", "bias.grad", "initial_state.grad")


def make(batch, length, dim, width, dtype, *, device="cpu", bias=True, initial=True, cu_seqlens=None, rows_per_step=0):
    """Arguments as a dict; parameters and states in the compute dtype, as modules keep them."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    index = None
    shape = (batch, length, dim)
    if rows_per_step:
        rows = batch * length * rows_per_step
        index = torch.randperm(rows, device=device).view(batch, length, rows_per_step).to(torch.int32)
        shape = (rows, dim)
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    sequences = batch if cu is None else len(cu_seqlens) - 1

    def normal(*shape, dtype=compute):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    return {
        "x": normal(*shape, dtype=dtype),
        "weight": normal(dim, width),
        "bias": normal(dim) if bias else None,
        "initial_state": normal(sequences, dim, width) if initial else None,
        "cu_seqlens": cu,
        "row_index": index,
    }


def outputs_and_gradients(function, arguments, activation, grads, dtype=None):
    """out, final_state and the gradients in the order of NAMES; None where an argument is not given."""
    arguments = {
        k: v if dtype is None or v is None or not v.is_floating_point() else v.detach().to(dtype).requires_grad_()
        for k, v in arguments.items()
    }
    out, final = function(**arguments, activation=activation, return_final_state=True)
    inputs = [arguments[k] for k in ("x", "weight", "bias", "initial_state")]
    wanted = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad((out, final), wanted, (grads[0].to(out.dtype), grads[1].to(final.dtype))))
    return [out, final, *(None if t is None else next(found) for t in inputs)]


def compare(arguments, activation):
    dtype, x, weight = arguments["x"].dtype, arguments["x"], arguments["weight"]
    index, cu = arguments["row_index"], arguments["cu_seqlens"]
    batch, length = (x if index is None else index).shape[:2]
    grads = (
        torch.randn(batch, length, x.shape[-1], device=x.device).to(dtype),
        torch.randn(batch if cu is None else len(cu) - 1, *weight.shape, device=x.device),
    )
    got = outputs_and_gradients(rom.ops.causal_conv1d, arguments, activation, grads)
    plain = outputs_and_gradients(reference.causal_conv1d, arguments, activation, grads)
    expected = outputs_and_gradients(reference.causal_conv1d, arguments, activation, grads, torch.float64)
    for name, g, p, e in zip(NAMES, got, plain, expected):
        if e is not None:
            assert_close(name, g, e, p)
    assert got[0].dtype == got[2].dtype == dtype
