"""Random calls of selective_scan, and the comparison of one call with the float64 reference."""

import torch
from tolerance import assert_close

import rom
from rom.reference import scan as reference

ACTIVATIONS = ("u", "delta", "B", "C", "z")


def make(
    shape, state, dtype, device="cpu", groups=None, constant="", rows=None, cu_seqlens=None, bare=False, out_dtype=None
):
    """(tensors, options) of one call; parameters in float32 (float64 for float64), perturbed A, trained-like delta.

    groups: B and C by groups. constant: which of B and C do not vary with time. rows: K of row_index. bare: no options.
    """
    batch, length, dim = shape
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def coefficient(name):
        if name in constant:
            return torch.randn(dim, state).to(parameter)
        return torch.randn((batch, length, state) if groups is None else (batch, length, groups, state)).to(dtype)

    tensors = {
        "u": torch.randn(shape).to(dtype),
        "delta": torch.rand(shape).to(dtype) if bare else torch.randn(shape).to(dtype),
        "A": (-torch.arange(1, state + 1) * torch.exp(0.3 * torch.randn(dim, state))).to(parameter),
        "B": coefficient("B"),
        "C": coefficient("C"),
    }
    options = {"return_final_state": True}
    if not bare:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        tensors["D"] = torch.randn(dim).to(parameter)
        tensors["z"] = torch.randn(shape if rows is None else (batch * length * rows, dim)).to(dtype)
        tensors["delta_bias"] = (torch.randn(dim) - 3).to(parameter)
        tensors["initial_state"] = torch.randn(sequences, dim, state).to(parameter)
        options["delta_softplus"] = True
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    if rows is not None:
        options["row_index"] = torch.randperm(batch * length * rows).int().view(batch, length, rows).to(device)
    if out_dtype is not None:
        options["out_dtype"] = out_dtype
    return {k: v.to(device) for k, v in tensors.items()}, options


def outputs_and_gradients(function, tensors, options, grads=None):
    """[out, final_state, gradients in the order of `tensors`] for output gradients from seed 2 (or `grads`)."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grads is None:
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [g.to(o.dtype) for g, o in zip(grads, outputs)])
    return [*outputs, *gradients]


def compare(shape, state, dtype, device="cpu", scale=1.0, change=None, **case):
    """Outputs and gradients of the fastest backend against the float64 reference and plain torch in `dtype`.

    change: {name of a tensor: function that makes it extreme}.
    """
    tensors, options = make(shape, state, dtype, device, **case)
    tensors |= {name: function(tensors[name]) for name, function in (change or {}).items()}
    got = outputs_and_gradients(rom.ops.selective_scan, tensors, options)
    plain = outputs_and_gradients(reference.selective_scan, tensors, options)
    generator = torch.Generator().manual_seed(2)  # what the low-precision run is really given
    grads = [torch.randn(o.shape, generator=generator).to(o.device).to(o.dtype).double() for o in got[:2]]
    options = {k: v for k, v in options.items() if k != "out_dtype"}
    expected = outputs_and_gradients(
        reference.selective_scan, {k: v.double() for k, v in tensors.items()}, options, grads
    )
    for name, g, p, e in zip(("out", "final_state", *tensors), got, plain, expected):
        assert_close(name, g, e, p, scale)
