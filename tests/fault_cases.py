"""A faulty product as a loop over Python numbers whose bits come from `struct`, and sites of every target."""

import struct

import numpy as np
import torch

from rom import faults
from rom.faults import ALL, Target

FORMATS = {torch.float64: ("<d", "<Q"), torch.float32: ("<f", "<I"), torch.float16: ("<e", "<H")}
HIGH = {torch.float64: 30, torch.float32: 30, torch.bfloat16: 14, torch.float16: 14}  # the largest exponent bit


def bits_of(value, dtype):
    if dtype == torch.bfloat16:
        return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    floating, integer = FORMATS[dtype]
    return struct.unpack(integer, struct.pack(floating, value))[0]


def from_bits(bits, dtype):
    if dtype == torch.bfloat16:
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    floating, integer = FORMATS[dtype]
    return struct.unpack(floating, struct.pack(integer, bits))[0]


def changed(value, site, dtype):
    """The value with the site's masks applied, by struct."""
    shift = 32 * int(site["flags"])
    width = (1 << 8 * dtype.itemsize) - 1
    keep = ((1 << 64) - 1) ^ ((0xFFFFFFFF ^ int(site["and_mask"])) << shift)
    return from_bits((bits_of(value, dtype) & keep ^ int(site["xor_mask"]) << shift) & width, dtype)


def loop(a, b, bias, sites, compute):  # noqa: PLR0912
    """One product after the other, in float64 (or the accumulator's dtype where a site looks at it)."""
    left, right = a.clone(), b.clone()
    dtype, (samples, k_size) = a.dtype, (a.shape[0], a.shape[-1])
    here = [s for s in sites if s["sample"] == ALL or s["sample"] < samples]
    offset = torch.zeros(b.shape[-1], dtype=dtype) if bias is None else bias.clone()
    for s in here:
        every = range(samples) if s["sample"] == ALL else [int(s["sample"])]
        if s["target"] == Target.A:
            for i in every:
                left[i, s["row"], s["k"]] = changed(left[i, s["row"], s["k"]].item(), s, dtype)
        if s["target"] == Target.B and s["sample"] == ALL:
            right[s["k"], s["col"]] = changed(right[s["k"], s["col"]].item(), s, dtype)
        if s["target"] == Target.BIAS:
            offset[s["col"]] = changed(offset[s["col"]].item(), s, dtype)
    y = torch.empty(*a.shape[:-1], b.shape[-1], dtype=dtype)
    for i, row, col in np.ndindex(*y.shape):
        mine = [s for s in here if s["sample"] in (i, ALL)]
        column = right[:, col].clone()
        for s in mine:
            if s["target"] == Target.B and s["sample"] == i and s["col"] == col:
                column[s["k"]] = changed(column[s["k"]].item(), s, dtype)
        mine = [s for s in mine if (s["row"], s["col"]) == (row, col)]
        total = torch.zeros((), dtype=compute)
        for k in range(k_size + 1):
            for s in mine:
                if s["target"] == Target.ACCUMULATOR and s["k"] == k:
                    total = torch.tensor(changed(total.item(), s, compute), dtype=compute)
            if k < k_size:
                total = total + left[i, row, k].to(compute) * column[k].to(compute)
        total = total + offset[col].to(compute)
        for s in mine:
            if s["target"] == Target.BEFORE_CAST:
                total = torch.tensor(changed(total.item(), s, compute), dtype=compute)
        value = total.to(dtype)
        for s in mine:
            if s["target"] == Target.OUTPUT:
                value = torch.tensor(changed(value.item(), s, dtype), dtype=dtype)
        y[i, row, col] = value
    return y


def operands(dtype, samples=3, rows=2, k=70, cols=4, device="cpu"):
    a, b, bias = torch.randn(samples, rows, k), torch.randn(k, cols), torch.randn(cols)
    return tuple(x.to(dtype).to(device) for x in (a, b, bias))


def some_sites(dtype):
    """Every target; two records of one word, a shared and an own weight, a fault of all samples, an absent sample."""
    high, compute = HIGH[dtype], torch.float64 if dtype == torch.float64 else torch.float32
    exponent, sign = faults.flip(1 << (high - 2)), faults.flip(1 << (high + 1))
    upper = {"upper": dtype == torch.float64}
    wide = {"upper": compute == torch.float64}
    wide_sign = faults.flip(1 << 31)
    return np.concatenate(
        [
            faults.sites(Target.A, sign, sample=1, row=1, k=69, **upper),
            faults.sites(Target.A, exponent, sample=1, row=1, k=69, **upper),
            faults.sites(Target.A, sign, sample=ALL, row=0, k=3, **upper),
            faults.sites(Target.B, sign, sample=ALL, k=5, col=1, **upper),
            faults.sites(Target.B, exponent, sample=2, k=6, col=1, **upper),
            faults.sites(Target.B, sign, sample=2, k=6, col=1, **upper),
            faults.sites(Target.B, sign, sample=0, k=[5, 40], col=[1, 3], **upper),
            faults.sites(Target.ACCUMULATOR, wide_sign, sample=2, row=0, col=1, k=64, **wide),
            faults.sites(Target.ACCUMULATOR, wide_sign, sample=2, row=0, col=1, k=32, **wide),
            faults.sites(Target.ACCUMULATOR, faults.flip(1 << 25), sample=0, row=1, col=[0, 2], k=[0, 70], upper=False),
            faults.sites(Target.ACCUMULATOR, wide_sign, sample=ALL, row=1, col=3, k=32, **wide),
            faults.sites(Target.BIAS, sign, col=2, **upper),
            faults.sites(Target.BEFORE_CAST, wide_sign, sample=[0, 2], row=[0, 0], col=[0, 1], **wide),
            faults.sites(Target.OUTPUT, exponent, sample=1, row=0, col=[0, 3], **upper),
            faults.sites(Target.OUTPUT, faults.stuck_at(1, 1 << (high + 1)), sample=1, row=1, col=0, **upper),
            faults.sites(Target.OUTPUT, sign, sample=7, row=1, col=0, **upper),
        ]
    )
