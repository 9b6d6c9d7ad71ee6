"""faulty_matmul and faulty_values against a loop over Python numbers whose bits come from `struct`."""

import math

import numpy as np
import pytest
import torch
from fault_cases import bits_of, changed, from_bits, loop, operands, some_sites
from tolerance import assert_close

import rom
from rom import faults
from rom.faults import ALL, Target
from rom.ops import faults as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["cpu", "reference"]


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_target(dtype, backend, mode, device):
    if backend == "cpu" and device.type != "cpu":
        pytest.skip("a CPU kernel")
    a, b, bias = operands(dtype, device=device)
    sites = some_sites(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    before = [x.clone() for x in (a, b, bias)]
    with rom.backend(backend):
        y, log = rom.ops.faulty_matmul(a, b, sites, bias, mode=mode)
    assert all(torch.equal(x, old) for x, old in zip((a, b, bias), before))
    wide = [None if x is None else x.cpu() for x in (a, b, bias)]
    expected = loop(*wide, sites, compute)
    assert torch.isfinite(expected).all()
    plain = (a.cpu() @ b.cpu() + bias.cpu()).double()
    assert (expected.double() - plain).abs().max() > 0.1
    # "fast" adds to a result that was rounded to 16 bits already: one more rounding, of a value 4 times as large.
    assert_close("y", y.cpu(), expected.double(), scale=4 if mode == "fast" else 2)
    entries = faults.log_records(log)
    assert entries["status"].tolist() == [1] * (len(sites) - 1) + [0]
    width = np.uint32((1 << min(32, 8 * dtype.itemsize)) - 1)
    memory = sites["target"] < Target.ACCUMULATOR
    changed_bits = (entries["old"] & sites["and_mask"]) ^ sites["xor_mask"]
    assert (entries["new"][memory] == changed_bits[memory] & width).all()
    assert entries["old"][0] == bits_of(wide[0][1, 1, 69].item(), dtype) >> (32 if dtype == torch.float64 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_hits_the_same_bits(dtype):
    a, b, bias = operands(dtype)
    sites = some_sites(dtype)
    y, log = rom.ops.faulty_matmul(a.cuda(), b.cuda(), sites, bias.cuda())
    expected, expected_log = rom.ops.faulty_matmul(a, b, sites, bias)
    assert_close("y", y.cpu(), expected.double(), scale=2)
    assert torch.equal(log[:, 0].cpu(), expected_log[:, 0])
    operand = torch.from_numpy(np.isin(sites["target"], (Target.A, Target.B, Target.BIAS)))
    assert torch.equal(log.cpu()[operand], expected_log[operand])  # elsewhere the words have a sum's rounding in them
    assert torch.equal((log[:, 1] ^ log[:, 2]).cpu(), expected_log[:, 1] ^ expected_log[:, 2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_flips_are_those_of_struct(dtype, backend):
    total = 8 * dtype.itemsize
    patterns = [0, 1, 3, 1 << (total - 1), (1 << (total - 1)) - 1, (1 << total) - 1]  # ±0, subnormals, NaN payloads
    mantissa = {16: 10, 32: 23, 64: 52}[total]
    infinity = ((1 << (total - 1 - mantissa)) - 1) << mantissa
    patterns += [infinity, infinity | 1, infinity | 1 << (mantissa - 1), (1 << mantissa) - 1, 1 << mantissa]
    generator = np.random.default_rng(0)
    patterns += [int(p) & ((1 << total) - 1) for p in generator.integers(0, 1 << 63, 200, dtype=np.uint64) * 2 + 1]
    words = np.array(patterns, np.uint64).astype({16: np.uint16, 32: np.uint32, 64: np.uint64}[total])
    x = torch.from_numpy(words.view({16: np.int16, 32: np.int32, 64: np.int64}[total])).view(dtype)[:, None]
    for bit in range(total):
        sites = faults.sites(Target.OUTPUT, faults.flip(1 << bit % 32), np.arange(len(x)), upper=bit >= 32)
        with rom.backend(backend):
            y, log = rom.ops.faulty_values(x, sites)
        got = y.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[total]).numpy().view(words.dtype)[:, 0]
        assert (got == words ^ words.dtype.type(1 << bit)).all()
        for value, result in zip(x[:6, 0].tolist(), y[:6, 0].tolist()):  # and the value is what struct says
            if not math.isnan(value):
                expected = from_bits(bits_of(value, dtype) ^ 1 << bit, dtype)
                assert result == expected or (math.isnan(result) and math.isnan(expected))
        entries = faults.log_records(log)
        assert (entries["old"] ^ entries["new"] == 1 << bit % 32).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_patterns_and_bits_of_bfloat16(backend):
    words = np.arange(1 << 16, dtype=np.uint16)
    x = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)[:, None]
    for bit in range(16):
        with rom.backend(backend):
            y, _ = rom.ops.faulty_values(x, faults.sites(Target.OUTPUT, faults.flip(1 << bit), sample=ALL))
        assert (y.view(torch.int16).numpy().view(np.uint16)[:, 0] == words ^ np.uint16(1 << bit)).all()


@pytest.mark.parametrize("masks", [faults.stuck_at(0, 0xF0), faults.stuck_at(1, 0xF0), faults.set_bits(0x3F800000)])
def test_stuck_and_set(masks):
    x = torch.randn(50, 1)
    y, _ = rom.ops.faulty_values(x, faults.sites(Target.OUTPUT, masks, np.arange(50)))
    got, old = (t.view(torch.int32).numpy().view(np.uint32) for t in (y, x))
    assert (got == (old & np.uint32(masks[0])) ^ np.uint32(masks[1])).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8(backend):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 2, 70), (70, 4)))
    sites = np.concatenate(
        [
            faults.sites(Target.A, faults.flip(1 << 7), 1, 1, k=3),
            faults.sites(Target.B, faults.flip(1 << 6), 2, k=9, col=2),
            faults.sites(Target.ACCUMULATOR, faults.flip(1 << 20), 0, 0, col=1, k=32),
            faults.sites(Target.OUTPUT, faults.flip(1 << 31), 0, 1, col=1),
        ]
    )
    with rom.backend(backend):
        y, log = rom.ops.faulty_matmul(a, b, sites)
    left, right = a.int(), b.int()
    left[1, 1, 3] = (a[1, 1, 3] ^ -128).int()
    expected = left @ right
    expected[2] = left[2] @ torch.where(
        (torch.arange(70)[:, None] == 9) & (torch.arange(4) == 2), (b ^ 64).int(), right
    )
    part = left[0, 0, :32] @ right[:32, 1]
    expected[0, 0, 1] += (part ^ 1 << 20) - part
    expected[0, 1, 1] ^= -(2**31)
    assert y.dtype == torch.int32 and torch.equal(y, expected)
    assert (log[:, 0] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_matrices(backend):
    a, b = torch.randn(2, 3, 5, 40, dtype=torch.float64), torch.randn(2, 3, 40, 4, dtype=torch.float64)
    sites = np.concatenate(
        [
            faults.sites(Target.A, faults.flip(1 << 31), 1, row=2 * 5 + 3, k=7, upper=True),
            faults.sites(Target.B, faults.flip(1 << 31), 0, row=1, k=9, col=2, upper=True),
            faults.sites(Target.ACCUMULATOR, faults.flip(1 << 31), 1, row=5, col=3, k=32, upper=True),
        ]
    )
    left, right = a.clone(), b.clone()
    left[1, 2, 3, 7] *= -1
    right[0, 1, 9, 2] *= -1
    expected = left @ right
    expected[1, 1, 0, 3] -= 2 * left[1, 1, 0, :32] @ right[1, 1, :32, 3]
    with rom.backend(backend):
        y, log = rom.ops.faulty_matmul(a, b, sites)
    assert_close("y", y, expected)
    assert (log[:, 0] == 1).all()


def test_what_no_site_touches_is_torchs_own_product():
    a, b, bias = operands(torch.float32)
    plain = torch.nn.functional.linear(a, b.mT.contiguous(), bias)
    nothing = np.zeros(0, faults.SITE)
    y, log = rom.ops.faulty_matmul(a, b.mT.contiguous().mT, nothing, bias)
    assert torch.equal(y, plain) and log.shape == (0, 3)
    one = faults.sites(Target.ACCUMULATOR, faults.flip(1 << 31), 1, 1, 2, k=32)
    y, _ = rom.ops.faulty_matmul(a, b.mT.contiguous().mT, one, bias)
    assert (y != plain).sum() == 1 and y[1, 1, 2] != plain[1, 1, 2]
    one["and_mask"], one["xor_mask"] = faults.flip(0)  # looked at, but not changed
    assert torch.equal(rom.ops.faulty_matmul(a, b.mT.contiguous().mT, one, bias)[0], plain)


def test_cpu_and_reference_agree_on_sites_masks_and_log():
    a, b, bias = operands(torch.bfloat16, samples=9, rows=3, k=130, cols=33)
    strata = [
        faults.Stratum("", Target.A, "bfloat16", 9, rows=3, k=130),
        faults.Stratum("", Target.B, "bfloat16", 9, cols=33, k=130),
        faults.Stratum("", Target.B, "bfloat16", None, cols=33, k=130),
        faults.Stratum("", Target.OUTPUT, "bfloat16", 9, rows=3, cols=33),
    ]
    sites = faults.FaultPlan.simple(strata, 300, seed=5)[:].sites
    logs = []
    for backend in BACKENDS:
        with rom.backend(backend):
            logs.append(faults.log_records(rom.ops.faulty_matmul(a, b, sites, bias)[1]))
    memory = sites["target"] != Target.OUTPUT
    assert (logs[0][memory] == logs[1][memory]).all() and (logs[0]["status"] == 1).all()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_deterministic_whatever_the_thread_count(mode):
    a, b, bias = operands(torch.float32, samples=40, rows=8, k=200, cols=60)
    strata = [faults.Stratum("", Target.B, "float32", 40, cols=60, k=200)]
    strata += [faults.Stratum("", Target.ACCUMULATOR, "float32", 40, 8, 60, 200)]
    sites = faults.FaultPlan.simple(strata, 2000, seed=5)[:].sites
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, log = rom.ops.faulty_matmul(a, b, sites, bias, mode=mode)
        clean = torch.zeros_like(y)  # the library's own product may depend on the threads; ours may not
        runs.append((torch.where(y != torch.addmm(bias, a.flatten(0, 1), b).view(y.shape), y, clean), log))
    assert all(torch.equal(x.nan_to_num(1), y.nan_to_num(1)) for run in runs[1:] for x, y in zip(runs[0], run))


def test_bounds_restrict_the_result():
    a, b, _ = operands(torch.float32)
    site = faults.sites(Target.OUTPUT, faults.set_bits(0x7FC00000), 0)
    for nan_to, value in (("max", 2.0), ("zero", 0.0)):
        y, _ = rom.ops.faulty_matmul(a, b, site, bounds=(-1.0, 2.0), nan_to=nan_to)
        assert y[0, 0, 0] == value and y.min() == -1 and y.max() == 2
    assert rom.ops.faulty_matmul(a, b, site, bounds=(-1.0, 2.0), nan_to="keep")[0][0, 0, 0].isnan()
    site["xor_mask"] = 0xFF800000  # −infinity
    assert rom.ops.faulty_matmul(a, b, site, bounds=(-1.0, 2.0))[0][0, 0, 0] == -1


@pytest.mark.parametrize("shape", [((0, 4), (4, 3)), ((2, 0), (0, 3)), ((2, 4), (4, 0)), ((2, 0, 4), (4, 3))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(shape, backend):
    a, b = (torch.ones(s, requires_grad=True) for s in shape)
    with rom.backend(backend):
        y, log = rom.ops.faulty_matmul(a, b, faults.sites(Target.OUTPUT, faults.flip(1), 0))
        y.sum().backward()
    assert y.shape == (*shape[0][:-1], shape[1][1]) and not log.any() and a.grad.shape == a.shape


def test_strided_values():
    x = torch.randn(2, 5, 3, 4)
    site = faults.sites(Target.OUTPUT, faults.flip(1 << 31), 1, row=7, col=2)
    for view in (x.movedim(1, -1), x.transpose(1, 2), x[:, ::2].movedim(1, -1), x[:, :, 0]):
        row, col = np.unravel_index(7 if view.dim() == 4 else 4, view.shape[1:-1])[0], 2
        site["row"] = 7 if view.dim() == 4 else 4
        y, _ = rom.ops.faulty_values(view, site)
        flat, expected = y.reshape(2, -1, y.shape[-1]), view.reshape(2, -1, y.shape[-1]).clone()
        expected[1, int(site["row"][0]), 2] *= -1
        assert torch.equal(flat, expected) and row >= 0 and col == 2


# ------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
def test_gradcheck(backend, batched):
    a, b, bias = (x.requires_grad_() for x in operands(torch.float64, k=33))
    sites = some_sites(torch.float64)
    sites["k"] = np.minimum(sites["k"], 32)
    sites = sites[sites["flags"] == faults.UPPER]  # a flip far below eps is noise to a finite difference
    if batched:
        a, b = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((3, 2, 33), (3, 33, 4)))
        sites, bias = sites[(sites["target"] != Target.BIAS) & (sites["sample"] != ALL)], None
    a_, b_ = a, b
    with rom.backend(backend):
        function = lambda a, b, *bias: rom.ops.faulty_matmul(a, b, sites, *bias, persistence="permanent")[0]  # noqa: E731
        inputs = (a_, b_) if bias is None else (a_, b_, bias)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=backend == "reference")
        values = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
        mine = sites[sites["target"] == Target.OUTPUT]
        assert torch.autograd.gradcheck(lambda x: rom.ops.faulty_values(x, mine)[0], (values,))


def by_hand(a, b, bias, sites, slope_of):
    """Sites that change memory or results only, through autograd: value · slope, moved to the faulty value."""

    def through(x, place, site):
        slope, value = slope_of(x[place].item(), site), changed(x[place].item(), site, x.dtype)
        mask = torch.zeros_like(x)
        mask[place] = 1
        return x * (1 + (slope - 1) * mask) + (mask * (value - slope * x)).detach()

    for site in sites[sites["target"] == Target.A]:
        a = through(a, (int(site["sample"]), int(site["row"]), int(site["k"])), site)
    for site in sites[sites["target"] == Target.B]:
        b = through(b, (int(site["k"]), int(site["col"])), site)
    y = a @ b + bias
    for site in sites[sites["target"] == Target.OUTPUT]:
        y = through(y, (int(site["sample"]), int(site["row"]), int(site["col"])), site)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["true", "ste", "zero", "clean"])
def test_gradient_modes(grad, backend):
    inputs = [x.requires_grad_() for x in operands(torch.float64)]
    sites = some_sites(torch.float64)
    sites = sites[np.isin(sites["target"], (Target.A, Target.OUTPUT)) & (sites["sample"] < 3)]
    sites = np.concatenate([sites, faults.sites(Target.B, faults.flip(1 << 28), k=5, col=1, upper=True)])

    def slope_of(value, site):
        result = changed(value, site, torch.float64)
        ratio = 2.0 ** (np.frexp(result)[1] - np.frexp(value)[1]) * (1 if (result < 0) == (value < 0) else -1)
        return {"true": ratio if result != value else 1, "ste": 1, "zero": 0 if result != value else 1, "clean": 1}[
            grad
        ]

    weights = torch.randn(3, 2, 4, dtype=torch.float64)
    with rom.backend(backend):
        for persistence in ("permanent", "transient"):
            y, _ = rom.ops.faulty_matmul(*inputs[:2], sites, inputs[2], grad=grad, persistence=persistence)
            got = torch.autograd.grad((y * weights).sum(), inputs)
            expected = torch.autograd.grad((by_hand(*inputs, sites, slope_of) * weights).sum(), inputs)
            if grad == "clean":
                expected = torch.autograd.grad(((inputs[0] @ inputs[1] + inputs[2]) * weights).sum(), inputs)
            elif persistence == "transient":  # slopes as before, but the products read clean operands
                memory = sites[sites["target"] != Target.OUTPUT]
                leaf = [x.detach().requires_grad_() for x in inputs]
                g = torch.autograd.grad((by_hand(*inputs, sites, slope_of) * weights).sum(), inputs[2])[0]
                y = by_hand(*leaf, memory, slope_of).detach().requires_grad_()
                outputs = sites[sites["target"] == Target.OUTPUT]
                zero = torch.zeros_like(y)
                g = torch.autograd.grad(
                    (by_hand(y, torch.eye(4).double(), zero, outputs, slope_of) * weights).sum(), y
                )[0]
                scaled = [torch.ones_like(x) for x in leaf[:2]]
                for site in memory:
                    which = int(site["target"])
                    place = tuple(int(site[c]) for c in (("sample", "row", "k"), ("k", "col"))[which])
                    before = scaled[which][place] * 0 + values_before(leaf[which], memory, site, place)
                    scaled[which][place] *= slope_of(before.item(), site)
                expected = (
                    scaled[0] * (g @ leaf[1].detach().mT),
                    scaled[1] * (leaf[0].detach().flatten(0, 1).mT @ g.flatten(0, 1)),
                    g.sum((0, 1)),
                )
            for name, mine, theirs in zip(("a", "b", "bias"), got, expected):
                assert_close(f"{name}, {persistence}", mine, theirs)


def values_before(x, memory, site, place):
    """What a site finds: the value, changed by the sites of the same place before it."""
    value = x[place].item()
    for other in memory:
        if other is site or (other == site).all():
            break
        if other["target"] == site["target"] and all(other[c] == site[c] for c in ("sample", "row", "col", "k")):
            value = changed(value, other, x.dtype)
    return torch.tensor(value, dtype=x.dtype)


def test_slopes_of_subnormals_and_non_finite_values():
    x = torch.tensor([[1.0], [2.0**-127], [2.0**100], [3.0]], requires_grad=True)
    sites = faults.sites(Target.OUTPUT, faults.flip(1 << 23), np.arange(4))
    sites["xor_mask"][2], sites["xor_mask"][3] = 1 << 30 | 1 << 29, 1 << 30
    y, _ = rom.ops.faulty_values(x, sites)
    y.sum().backward()
    assert x.grad[:, 0].tolist()[:2] == [0.5, 1.0]  # 1 → 0.5; a subnormal → a normal of the same exponent
    top = faults.sites(Target.OUTPUT, faults.flip(1 << 30), 0)
    one = torch.ones(1, 1, requires_grad=True)
    y, _ = rom.ops.faulty_values(one, top)
    y.sum().backward()
    assert y.isinf() and one.grad == 0


# ------------------------------------------------------------------------------------------------ torch
def test_opcheck():
    a, b, bias = (x.requires_grad_() for x in operands(torch.float32))
    table = faults.records.to_tensor(some_sites(torch.float32))
    arguments = (a.detach()[:, None].requires_grad_(), b, bias, table, True, "true", False, "cpu")
    torch.library.opcheck(torch.ops.rom.faulty_matmul.default, arguments)
    mine = faults.records.to_tensor(faults.sites(Target.OUTPUT, faults.flip(1), 0))
    torch.library.opcheck(torch.ops.rom.faulty_values.default, (a, mine, "true", "cpu"))


def test_compile_and_export():
    table = faults.records.to_tensor(some_sites(torch.float32))

    def loss(a, b, bias):
        y, log = rom.ops.faulty_matmul(a * 2, b, table, bias)
        return (y * y).sum(), log

    inputs = [x.requires_grad_() for x in operands(torch.float32)]
    (expected, log), (got, compiled_log) = loss(*inputs), torch.compile(loss, fullgraph=True)(*inputs)
    assert torch.equal(log, compiled_log)
    for mine, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs)):
        assert_close("gradient", mine, theirs)


def test_autocast():
    a, b, bias = operands(torch.float32)
    site = faults.sites(Target.OUTPUT, faults.flip(1 << 15), 0)  # the sign of a bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = rom.ops.faulty_matmul(a, b, site, bias)
        plain = torch.nn.functional.linear(a, b.mT, bias)
    assert y.dtype == torch.bfloat16 and y[0, 0, 0] == -plain[0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"a": torch.ones(4)}, ValueError, r"a of shape \[S, \.\.\., K\], got \(4,\)"),
        ({"b": torch.ones(5, 3)}, ValueError, "b with K = 4 rows"),
        ({"b": torch.ones(2, 4, 3)}, ValueError, r"b of shape \[K, N\]"),
        ({"b": torch.ones(4, 3).half()}, TypeError, "b of dtype torch.float32 like a"),
        ({"a": torch.ones(2, 4).long()}, TypeError, "a of dtype float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias of shape \(3,\), got \(4,\)"),
        ({"sites": torch.ones(3, 8)}, TypeError, r"sites int32 \[n, 8\]"),
        ({"sites": [1]}, TypeError, "sites of dtype rom.faults.SITE.*got list"),
        ({"mode": "quick"}, ValueError, "mode of exact, fast, got 'quick'"),
        ({"grad": "some"}, ValueError, "grad of true, ste, zero, clean"),
        ({"persistence": "x"}, ValueError, "persistence of transient, permanent"),
        ({"bounds": (2.0, 1.0)}, ValueError, "low ≤ high"),
        ({"sites": (Target.OUTPUT, {"col": 3})}, ValueError, "OUTPUT with row below 1, col below 3.*col 3.*in site 0"),
        ({"sites": (Target.A, {"k": 4})}, ValueError, "A with row below 1, k below 4"),
        ({"sites": (Target.B, {"k": 4})}, ValueError, "B with .*k below 4"),
        ({"sites": (Target.B, {"k": 1, "sample": ALL, "col": 9})}, ValueError, "B with col below 3, k below 4"),
        ({"sites": (Target.ACCUMULATOR, {"k": 3})}, ValueError, "k a multiple of 32, or all"),
        ({"sites": (Target.BIAS, {"col": 0})}, ValueError, "a bias for the sites of target BIAS"),
        ({"sites": (Target.OUTPUT, {"upper": True})}, ValueError, "flags UPPER for float64"),
    ],
)
def test_errors(change, error, message, backend):
    arguments = {"a": torch.ones(2, 4), "b": torch.ones(4, 3), "sites": np.zeros(0, faults.SITE)} | change
    if isinstance(arguments["sites"], tuple):
        target, where = arguments["sites"]
        arguments["sites"] = faults.sites(target, faults.flip(1), **({"sample": 0} | where))
    with pytest.raises(error, match=message), rom.backend(backend):
        rom.ops.faulty_matmul(**arguments)


def test_examples(run_doctests):
    run_doctests(ops)
