import pytest
import torch
from tolerance import assert_close

import rom
from rom.reference import norm as reference

f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def values_and_gradients(function, x, weight, residual, grads):
    y, total = function(x, weight, residual)
    inputs = [t for t in (x, weight, residual) if t is not None]
    return [y, total, *torch.autograd.grad((y, total), inputs, [g.to(o.dtype) for g, o in zip(grads, (y, total))])]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "first-block"])
@pytest.mark.parametrize("x_dtype, stream_dtype", [(f32, f32), (f16, f16), (f16, f32), (f64, f64), (bf16, f32)])
def test_matches_float64(x_dtype, stream_dtype, residual):
    shape = (2, 9, 37)  # 18 rows: two programs of the backward pass
    x = torch.randn(shape).to(x_dtype).requires_grad_()
    stream = torch.randn(shape).to(stream_dtype).requires_grad_() if residual else None
    weight = torch.randn(37, requires_grad=True)
    grads = [g.to(x_dtype) for g in torch.randn(2, *shape)]
    in64 = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, stream)]
    with rom.backend("triton"):
        got = values_and_gradients(rom.ops.add_rms_norm, x, weight, stream, grads)
    plain = values_and_gradients(reference.add_rms_norm, x, weight, stream, grads)
    expected = values_and_gradients(reference.add_rms_norm, *in64, [g.double() for g in grads])
    for name, g, p, e in zip(("y", "sum", "x.grad", "weight.grad", "residual.grad"), got, plain, expected):
        assert_close(name, g, e, p, dtype=stream_dtype if name == "weight.grad" else None)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 128)])
def test_edges_and_rerun(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    with rom.backend("triton"):
        runs = [values_and_gradients(rom.ops.add_rms_norm, x, weight, None, torch.ones(2, *shape)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert not runs[0][0].isnan().any() and not runs[0][3].isnan().any()


def test_a_row_too_wide_for_a_tile_is_refused_with_the_reason():
    with rom.backend("triton"), pytest.raises(rom.BackendError, match="more than 65536"):
        rom.ops.add_rms_norm(torch.ones(1, 65537), torch.ones(65537))
