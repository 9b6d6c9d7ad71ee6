"""What the in-place decode steps share: `causal_conv1d_update` and `selective_state_update`."""

from __future__ import annotations

import torch

from rom.ops import _op


def refuse_gradients(op: str, remedy: str, **tensors: torch.Tensor | None) -> None:
    """With gradients on: the state is overwritten, so nothing is left to differentiate through."""
    wanting = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
    if wanting:
        raise RuntimeError(
            f"rom.ops.{op}: overwrites its state and has no gradient, but {', '.join(wanting)} requires one. "
            f"Call it under torch.no_grad(), or use {remedy} to differentiate."
        )


def check_slots(op: str, state: torch.Tensor, name: str, batch: int, state_indices: torch.Tensor | None) -> None:
    """`state_indices` must be int32 (batch); without it, sequence b of the batch owns slot b."""
    if state_indices is None:
        if state.shape[0] != batch:
            remedy = "Pass state_indices to say which slots the batch uses."
            _op.fail(op, f"{name} with {batch} slots, one per sequence", str(state.shape[0]), remedy)
        return
    if state_indices.dtype != torch.int32:
        raise TypeError(f"rom.ops.{op}: expected state_indices of dtype torch.int32, got {state_indices.dtype}.")
    _op.check_shape(op, "state_indices", state_indices, (batch,))


def check_slot_values(op: str, slots: int, state_indices: torch.Tensor | None) -> None:
    """No slot twice, none outside the state. Read on the CPU only: on a GPU it would wait for the device."""
    if state_indices is None or state_indices.device.type != "cpu":
        return
    used = [index for index in state_indices.tolist() if index >= 0]
    if used and max(used) >= slots:
        _op.fail(op, f"state_indices below {slots}, the number of slots", str(max(used)))
    if len(set(used)) != len(used):
        _op.fail(op, "every slot at most once in state_indices", str(state_indices.tolist()))


def readable(*tensors: torch.Tensor | None, activations: torch.Tensor) -> list[torch.Tensor | None]:
    """B, C or parameters in a dtype the native kernels read: the compute dtype, on CUDA the activations' too."""
    compute = _op.compute_dtype(activations.dtype)
    read = (compute, activations.dtype) if activations.is_cuda else (compute,)
    return [t if t is None or t.dtype in read else t.to(compute) for t in tensors]


def mark_overwritten(state: torch.Tensor) -> None:
    """Lets autograd notice when a tensor it saved was this state."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
