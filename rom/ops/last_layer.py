"""`logit_flips`, `weight_flips`: every single-bit fault of a classifier's last layer, in closed form."""

from __future__ import annotations

import math

import torch

from rom import dispatch, native
from rom.ops import _op
from rom.reference import last_layer as reference

NAN_TO = ("max", "zero", "keep")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Sums = tuple[torch.Tensor, torch.Tensor]


def logit_flips(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float = 1.0,
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
    by_image: bool = False,
) -> Sums:
    """Flips every bit of every output of a model's last layer, one at a time: what that does to the images' answers.

        t = scale · clamp(z, *bounds)      z' = z with a bit flipped
        |Δloss| = |log(1 − p_k + p_k e^{t'_k − t_k}) − [k is the label] (t'_k − t_k)|,      p = softmax(t)

    Exact, no sampling: B · C · bits faults at a few operations each.

    Args:
        logits: `[B, C]`, float32, bfloat16, float16 (float64: reference backend only): z, the values that are hit, as
            the layer stores them.
        labels: `[B]`, int64.
        scale: what the model multiplies them with in their dtype, as a cosine head does.
        bounds: (low, high), range restriction after the fault; None: none. nan_to: there NaN becomes high ("max"), 0
            ("zero"), or stays ("keep").
        by_image: sums over the classes of every image, instead of over the images of every class.

    Returns:
        `(loss, counts)`: loss float64 `[C or B, bits]`, Σ |Δloss| over the faults that are not due; counts int64
        `[C or B, bits, 6]`, faults that are masked, tolerable, sdc, critical, due (`rom.campaign.OUTCOMES`), and that
        change the top-1, due or not. No gradients.

    Raises:
        ValueError: shapes do not match, a label is no class, t is not finite without a fault. TypeError: a dtype.

    >>> loss, counts = rom.ops.logit_flips(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    >>> counts[1, 30:]  # a flip of bit 30 makes an infinity of 1.0; −1.0 changes the loss only
    tensor([[0, 0, 0, 0, 1, 1],
            [0, 1, 0, 0, 0, 0]])
    """
    op = "logit_flips"
    _op.check_tensors(op, "logits", logits=logits, labels=labels)
    _op.check_floating(op, "logits", logits)
    if logits.dim() != 2:
        _op.fail(op, "logits of shape [B, C]", str(_op.shape(logits)))
    logits = logits.detach()
    tail = _tail(op, logits.dtype, scale, bounds, nan_to)
    _check_labels(op, labels, *logits.shape)
    _check_finite(op, "logits", logits, tail)
    backend = dispatch.choose(op, logits.device.type, _refusals(logits.dtype))
    return torch.ops.rom.logit_flips(logits, labels, *tail, by_image, backend)


def weight_flips(
    features: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
    by_input: bool = False,
) -> Sums:
    """Flips every bit of every weight of the last layer, one at a time, and sums what that does to all images.

        z = x weightᵀ + bias;   a wrong weight (k, e) changes z_k by (w' − w) x_e, and nothing else

    Args:
        features: `[B, E]`, the layer's inputs, in weight's dtype.
        weight: `[C, E]`, float32, bfloat16, float16 (float64: reference backend only). bias: `[C]`.
        labels, scale, bounds, nan_to: as in `logit_flips`.
        by_input: results by input e, instead of by class.

    Returns:
        `(loss, counts)` as in `logit_flips`, rows C (or E): sums over (image, weight) cells. The products are summed
        once, without the fault, by torch in float32 (float64 for float64): a model that sums in another order differs
        in rounding.

    >>> x, weight = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    >>> loss, counts = rom.ops.weight_flips(x, weight, torch.tensor([0]), by_input=True)
    >>> counts[1].sum(0)  # x_1 = 0 hides a wrong weight, unless 1.0 becomes infinite: 0 times that is NaN
    tensor([63,  0,  0,  0,  1,  1])
    """
    op = "weight_flips"
    _op.check_tensors(op, "features", features=features, weight=weight, labels=labels, bias=bias)
    _op.check_floating(op, "weight", weight)
    _op.check_same_dtype(op, "weight", weight=weight, features=features)
    if weight.dim() != 2 or features.dim() != 2:
        _op.fail(op, "features [B, E] and weight [C, E]", f"{_op.shape(features)} and {_op.shape(weight)}")
    _op.check_shape(op, "features", features, (features.shape[0], weight.shape[1]))
    _op.check_shape(op, "bias", bias, (weight.shape[0],))
    compute = _op.compute_dtype(weight.dtype)
    features, weight = features.detach(), weight.detach()
    with _op.without_autocast(weight.device.type):
        sums = features.to(compute) @ weight.to(compute).T
        sums = sums if bias is None else sums + bias.detach().to(compute)
    tail = _tail(op, weight.dtype, scale, bounds, nan_to)
    _check_labels(op, labels, *sums.shape)
    _check_finite(op, "the layer's outputs", sums.to(weight.dtype), tail)
    backend = dispatch.choose(op, weight.device.type, _refusals(weight.dtype))
    return torch.ops.rom.weight_flips(features.to(compute), weight, sums, labels, *tail, by_input, backend)


# ------------------------------------------------------------------------------------------------ checks
def _tail(
    op: str, dtype: torch.dtype, scale: float, bounds: tuple[float, float] | None, nan_to: str
) -> tuple[float, float, float, float]:
    """(scale, low, high, what NaN becomes), in the layer's dtype."""
    if not math.isfinite(scale) or scale == 0:
        _op.fail(op, "a finite scale other than 0", str(scale))
    if nan_to not in NAN_TO:
        _op.fail(op, f"nan_to of {', '.join(NAN_TO)}", repr(nan_to))
    if bounds is None:
        return float(scale), -math.inf, math.inf, math.nan
    low, high = (torch.tensor(bound, dtype=dtype).item() for bound in bounds)
    if not low <= high:
        _op.fail(op, "bounds with low ≤ high", str(bounds))
    return float(scale), low, high, {"max": high, "zero": 0.0, "keep": math.nan}[nan_to]


def _check_labels(op: str, labels: torch.Tensor, images: int, classes: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"rom.ops.{op}: expected labels of dtype int64, got {labels.dtype}. Use labels.long().")
    _op.check_shape(op, "labels", labels, (images,))
    if images and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        _op.fail(op, f"labels of 0 to {classes - 1}", f"{int(labels.min())} to {int(labels.max())}")


def _check_finite(op: str, name: str, values: torch.Tensor, tail: tuple[float, float, float, float]) -> None:
    wrong = ~reference.to_logits(values, *tail).isfinite()
    if wrong.any():
        image = int(wrong.any(1).nonzero()[0])
        _op.fail(
            op,
            f"{name} that are finite without a fault",
            f"infinity or NaN for image {image}",
            "Leave it out, or scale.",
        )


def _refusals(dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    return (("cpu", "float64 has no native kernel here"),) if dtype == torch.float64 else ()


# ------------------------------------------------------------------------------------------------ kernels
def _outputs(rows: int, dtype: torch.dtype, device: torch.device) -> Sums:
    bits = 8 * dtype.itemsize
    loss = native.empty((rows, bits), torch.float64, device)
    return loss, native.empty((rows, bits, 6), torch.int64, device)


def _kernel_logit_flips(
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    low: float,
    high: float,
    nan_to: float,
    by_image: bool,
) -> Sums:
    loss, counts = _outputs(logits.shape[0 if by_image else 1], logits.dtype, logits.device)
    arguments = {
        "logits": logits,
        "labels": labels.contiguous(),
        "loss": loss,
        "counts": counts,
        "by_image": int(by_image),
        "scale": scale,
        "low": low,
        "high": high,
        "nan_to": nan_to,
    }
    workspace = native.workspace("logit_flips", logits.device, **arguments)
    native.call("logit_flips", logits.device, workspace=workspace, **arguments)
    return loss, counts


def _kernel_weight_flips(
    features: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    low: float,
    high: float,
    nan_to: float,
    by_input: bool,
) -> Sums:
    loss, counts = _outputs(weight.shape[int(by_input)], weight.dtype, weight.device)
    arguments = {
        "weight": weight,
        "features": features.T.contiguous(),
        "sums": sums,
        "labels": labels.contiguous(),
        "loss": loss,
        "counts": counts,
        "by_input": int(by_input),
        "scale": scale,
        "low": low,
        "high": high,
        "nan_to": nan_to,
    }
    workspace = native.workspace("weight_flips", weight.device, **arguments)
    native.call("weight_flips", weight.device, workspace=workspace, **arguments)
    return loss, counts


dispatch.register("logit_flips", "cpu", _kernel_logit_flips, kernels=("logit_flips",))
dispatch.register("logit_flips", "reference", reference.logit_flips)
dispatch.register("weight_flips", "cpu", _kernel_weight_flips, kernels=("weight_flips",))
dispatch.register("weight_flips", "reference", reference.weight_flips)

# ------------------------------------------------------------------------------------------------ registration
_TAIL = "float scale, float low, float high, float nan_to"
_op.define(f"logit_flips(Tensor logits, Tensor labels, {_TAIL}, bool by_image, str backend) -> (Tensor, Tensor)")
_op.define(
    f"weight_flips(Tensor features, Tensor weight, Tensor sums, Tensor labels, {_TAIL}, bool by_input, str backend)"
    " -> (Tensor, Tensor)"
)


def _logit_flips(*arguments):  # type: ignore[no-untyped-def]
    return dispatch.implementation("logit_flips", arguments[-1]).forward(*arguments[:-1])


def _weight_flips(*arguments):  # type: ignore[no-untyped-def]
    return dispatch.implementation("weight_flips", arguments[-1]).forward(*arguments[:-1])


_op.LIBRARY.impl("logit_flips", _logit_flips, "CompositeExplicitAutograd")
_op.LIBRARY.impl("weight_flips", _weight_flips, "CompositeExplicitAutograd")


def _fake_outputs(rows, like):  # type: ignore[no-untyped-def]
    bits = 8 * like.dtype.itemsize
    return like.new_empty((rows, bits), dtype=torch.float64), like.new_empty((rows, bits, 6), dtype=torch.int64)


@torch.library.register_fake("rom::logit_flips")
def _(logits, labels, scale, low, high, nan_to, by_image, backend):  # type: ignore[no-untyped-def]
    return _fake_outputs(logits.shape[0 if by_image else 1], logits)


@torch.library.register_fake("rom::weight_flips")
def _(features, weight, sums, labels, scale, low, high, nan_to, by_input, backend):  # type: ignore[no-untyped-def]
    return _fake_outputs(weight.shape[int(by_input)], weight)
