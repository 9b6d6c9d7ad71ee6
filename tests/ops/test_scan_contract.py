"""selective_scan as an operator: errors, torch.compile, export, autocast, backends, what only the reference does."""

import pytest
import torch
from scan_cases import make, outputs_and_gradients
from tolerance import assert_close

import rom
from rom.ops import scan
from rom.reference import scan as reference


def op_arguments(tensors, options, save=True):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return (
        *(tensors.get(name) for name in names),
        options.get("delta_softplus", False),
        *(tensors.get("initial_state"), options.get("cu_seqlens"), options.get("row_index")),
        *(tensors["u"].dtype, save, "cpu"),
    )


@pytest.mark.parametrize(
    "case",
    [{}, {"bare": True}, {"groups": 2}, {"constant": "B"}, {"cu_seqlens": [0, 2, 7]}, {"rows": 2}],
    ids=str,
)
def test_opcheck(case):
    tensors, options = make((1, 7, 6), 3, torch.float32, **case)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    torch.library.opcheck(torch.ops.rom.selective_scan.default, op_arguments(tensors, options))


def test_compile_and_export():
    tensors, options = make((2, 9, 6), 3, torch.float32, rows=2)

    def loss(**tensors):
        out, state = rom.ops.selective_scan(**tensors, **options)
        return out, state

    expected = outputs_and_gradients(loss, tensors, {})
    got = outputs_and_gradients(torch.compile(loss, fullgraph=True), tensors, {})
    for name, g, e in zip(("out", "final_state", *tensors), got, expected):
        assert_close(name, g, e.double())

    class Module(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return rom.ops.selective_scan(u, delta, A, B, C)

    inputs = tuple(tensors[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Module(), inputs)
    assert "rom.selective_scan" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Module()(*inputs))


def test_nothing_is_saved_without_a_gradient():
    tensors, _ = make((1, 40, 6), 3, torch.float32, bare=True)
    assert torch.ops.rom.selective_scan(*op_arguments(tensors, {}, save=False))[2].numel() == 0
    tensors["u"].requires_grad_()
    with torch.no_grad():
        assert rom.ops.selective_scan(**tensors).grad_fn is None
    assert rom.ops.selective_scan(**tensors).grad_fn is not None


def test_saved_states_take_no_more_room_than_u():
    tensors, _ = make((2, 256, 64), 16, torch.bfloat16)
    checkpoints = torch.ops.rom.selective_scan(*op_arguments(tensors, {}))[2]
    assert checkpoints.nbytes <= tensors["u"].nbytes


def test_gradient_through_one_output_only():
    tensors, options = make((2, 40, 6), 3, torch.float32)
    for pick in (0, 1):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        rom.ops.selective_scan(**leaves, **options)[pick].sum().backward()
        exact = {k: v.double().requires_grad_() for k, v in tensors.items()}
        reference.selective_scan(**exact, **options)[pick].sum().backward()
        for name, leaf in leaves.items():
            expected = exact[name].grad
            if expected is None:
                assert leaf.grad is None or not leaf.grad.any(), name
            else:
                assert_close(name, leaf.grad, expected)


# ------------------------------------------------------------------------------------------------ reference only
def test_complex_A_and_many_states_run_on_the_reference():
    tensors, options = make((1, 5, 4), 3, torch.float64)
    tensors["A"] = torch.complex(tensors["A"], torch.randn(4, 3, dtype=torch.float64))
    tensors["initial_state"] = torch.complex(tensors["initial_state"], tensors["initial_state"])
    names, values = list(tensors), tuple(v.requires_grad_() for v in tensors.values())
    with rom.backend("reference"):
        assert torch.autograd.gradcheck(lambda *v: rom.ops.selective_scan(**dict(zip(names, v)), **options), values)
    with rom.backend("cpu"), pytest.raises(rom.BackendError, match="complex A, B or C run on the reference"):
        rom.ops.selective_scan(**tensors, **options)
    tensors, options = make((1, 5, 4), 300, torch.float32)
    with rom.backend("strict"), pytest.raises(rom.BackendError, match="300 states per channel, more than 256"):
        rom.ops.selective_scan(**tensors, **options)
    with rom.backend("reference"):
        assert rom.ops.selective_scan(**tensors, **options)[1].shape == (1, 4, 300)


def test_complex_A_is_the_sum_of_a_conjugate_pair():
    tensors, _ = make((1, 8, 4), 3, torch.float64, bare=True)
    A = torch.complex(tensors["A"], torch.randn(4, 3, dtype=torch.float64))
    pair = torch.cat([A, A.conj()], 1)
    B, C = (torch.cat([tensors[k], tensors[k]], -1) for k in ("B", "C"))
    h, expected = torch.zeros(1, 4, 6, dtype=torch.complex128), []
    for t in range(8):
        delta, u = tensors["delta"][:, t, :, None], tensors["u"][:, t, :, None]
        h = torch.exp(delta * pair) * h + delta * B[:, t, None] * u
        expected.append((h * C[:, t, None]).sum(-1).real)
    with rom.backend("reference"):
        got = rom.ops.selective_scan(**tensors | {"A": A})
    torch.testing.assert_close(got, torch.stack(expected, 1))


def test_double_backward_goes_through_the_reference():
    tensors, options = make((1, 3, 2), 2, torch.float64)
    names, values = list(tensors), tuple(v.requires_grad_() for v in tensors.values())
    with rom.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *v: rom.ops.selective_scan(**dict(zip(names, v)), **options), values)
    out, _ = rom.ops.selective_scan(**tensors, **options)
    (gradient,) = torch.autograd.grad(out.sum(), tensors["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*rom\.backend\('reference'\)"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------------ autocast, errors
def test_autocast():
    tensors, options = make((2, 20, 6), 3, torch.float32, rows=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = rom.ops.selective_scan(**tensors, **options)
        mixed, _ = rom.ops.selective_scan(**tensors | {"u": tensors["u"].bfloat16()}, **options)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32 and torch.equal(out, mixed)
    rounded = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in tensors.items()}
    assert torch.equal(out, rom.ops.selective_scan(**rounded, **options)[0])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"u": [1.0]}, TypeError, "expected u to be a tensor, got list"),
        ({"u": torch.ones(5, 4)}, ValueError, r"expected u of shape \[batch, length, dim\], got \(5, 4\)"),
        ({"u": torch.ones(1, 5, 4, dtype=torch.int64)}, TypeError, "expected u of dtype float32"),
        ({"delta": torch.ones(1, 6, 4)}, ValueError, r"expected delta of shape \(1, 5, 4\), got \(1, 6, 4\)"),
        ({"delta": torch.ones(1, 5, 4).half()}, TypeError, "expected delta of dtype torch.float32 like u"),
        ({"z": torch.ones(1, 5, 4).bfloat16()}, TypeError, "expected z of dtype torch.float32 like u"),
        ({"B": torch.ones(1, 5, 3).half()}, TypeError, "expected B of dtype torch.float32 like u"),
        ({"A": torch.ones(3, 4)}, ValueError, r"expected A of shape \(4, state\), got \(3, 4\)"),
        ({"A": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "expected A of dtype float32"),
        ({"B": torch.ones(1, 5, 2)}, ValueError, r"expected B of shape \(1, 5, 3\) or \(1, 5, 1, 3\) or \(4, 3\)"),
        ({"C": torch.ones(1, 5, 3, 3)}, ValueError, "a number of groups in C that divides dim 4, got 3"),
        ({"B": torch.ones(1, 5, 2, 3), "C": torch.ones(1, 5, 4, 3)}, ValueError, "expected C with 2 groups like B"),
        ({"D": torch.ones(3)}, ValueError, r"expected D of shape \(4,\), got \(3,\)"),
        ({"D": torch.ones(4, device="meta")}, ValueError, "expected D on cpu like u, got meta"),
        ({"delta_bias": torch.ones(1, 4)}, ValueError, r"expected delta_bias of shape \(4,\)"),
        ({"initial_state": torch.ones(1, 4, 2)}, ValueError, r"expected initial_state of shape \(1, 4, 3\)"),
        ({"out_dtype": torch.float16}, TypeError, "expected out_dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "expected cu_seqlens of dtype int32, got torch.int64"),
        ({"cu_seqlens": ints(0)}, ValueError, "with at least one sequence"),
        ({"cu_seqlens": ints(0, 4)}, ValueError, "expected cu_seqlens to rise from 0 to the length 5"),
        ({"cu_seqlens": ints(0, 4, 2, 5)}, ValueError, "expected cu_seqlens to rise from 0 to the length 5"),
        ({"row_index": torch.zeros(5, 1)}, TypeError, "expected row_index of dtype int32"),
        ({"row_index": ints(0, 1, 2, 3, 4)}, ValueError, "expected row_index of shape"),
        ({"row_index": ints(0, 1, 2, 3, 3)[:, None]}, ValueError, "each of its 5 rows exactly once"),
        ({"row_index": ints(0, 1, 2, 3, 5)[:, None]}, ValueError, "each of its 5 rows exactly once"),
        ({"row_index": ints(0, 1, 2, 3, 4)[:, None], "z": torch.ones(1, 5, 4)}, ValueError, r"z of shape \(5, 4\)"),
    ],
)
def test_errors(change, error, message):
    tensors, _ = make((1, 5, 4), 3, torch.float32, bare=True)
    with pytest.raises(error, match=message):
        rom.ops.selective_scan(**tensors | change)


def test_packed_sequences_want_batch_one():
    tensors, _ = make((2, 5, 4), 3, torch.float32, bare=True)
    with pytest.raises(ValueError, match="expected batch 1 with cu_seqlens, got batch 2"):
        rom.ops.selective_scan(**tensors, cu_seqlens=ints(0, 5))


def test_docstring_example(run_doctests):
    run_doctests(scan)
