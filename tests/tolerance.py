"""The only place where a tolerance is stated.

Errors are measured against the float64 reference, as the relative norm ‖got − ref‖ / ‖ref‖ and as the largest deviation
over the largest magnitude. The bound is

    FLOOR[dtype] + 2 × (error of plain torch in the same dtype, where a test gives it)

so that a kernel in low precision may be at most about twice as wrong as the plain formula would be.
"""

import torch

FLOOR = {
    # float64: the native kernels' polynomials are good to ~1e-15; sums of some thousand terms lose two or three digits.
    torch.float64: 1e-11,
    # float32: half an ulp is 6e-8; decays near 1 and sums over ~2000 steps amplify it by up to about 50.
    torch.float32: 4e-6,
    # Rounding the result itself: half an ulp of 8 and 11 bits of mantissa, and once more for a rounded input of a sum.
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def errors(got, reference):
    """(relative norm, largest deviation over largest magnitude) against a float64 reference."""
    got, reference = got.detach().double(), reference.detach().double()
    assert got.shape == reference.shape, f"shape {tuple(got.shape)} instead of {tuple(reference.shape)}"
    if got.numel() == 0:
        return 0.0, 0.0
    deviation = (got - reference).abs()
    scale = reference.abs().max().clamp_min(1e-30)
    return (deviation.norm() / reference.norm().clamp_min(1e-30)).item(), (deviation.max() / scale).item()


def assert_close(name, got, reference, plain=None, scale=1.0, dtype=None):
    """`got` is as close to the float64 `reference` as its dtype allows (or `dtype`, if a coarser one is on the way).

    `scale` widens the floor and wants a reason at the call.
    """
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    floor = FLOOR[dtype or got.dtype] * scale
    allowed = (0.0, 0.0) if plain is None else errors(plain, reference)
    for kind, error, extra in zip(("norm", "max"), errors(got, reference), allowed):
        assert error <= floor + 2 * extra, f"{name}: {kind} error {error:.2e} > {floor:.1e} + 2 × {extra:.1e}"
