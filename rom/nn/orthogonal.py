"""Orthogonal weights: a drop-in for torch.nn.utils.parametrizations.orthogonal, and a linear layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from rom import ops
from rom.reference.orthogonal import polish

MAPS = ("cayley", "householder", "matrix_exp", "qr")
_INVERSES = {"cayley": ops.cayley_inverse, "householder": ops.householder_inverse}


def orthogonal(
    module: nn.Module, name: str = "weight", orthogonal_map: str | None = None, *, use_trivialization: bool = True
) -> nn.Module:
    """Makes a weight orthogonal and keeps it so: `torch.nn.utils.parametrizations.orthogonal`, repaired.

    `module.name` becomes a function of an unconstrained parameter: its columns are orthonormal (its rows, if it is
    wide), whatever an optimiser, weight decay or an average over models does to that parameter. torch's version of the
    default map for non-square weights keeps the ±1 of Q inside the trained tensor: one AdamW step with default
    arguments turns the weight into zeros. Here signs are a buffer of which only the sign is read. The weight may be
    float32, float64, bfloat16 or float16 (computed in float32).

    Args:
        module: where the parameter is.
        name: its name. `[..., n, k]`: leading dimensions are a batch.
        orthogonal_map: "cayley", "householder", "matrix_exp" or "qr"; None is "cayley" for a square weight (torch:
            matrix_exp, which is many times slower and less exact), else "householder". qr is torch.linalg.qr: it has no
            gradient where the columns are linearly dependent.
        use_trivialization: matters for matrix_exp alone, whose values go through a dense n × n `base` as in torch;
            without it that map cannot be assigned to. The other three need no base, and k signs suffice.

    Returns:
        The module. The weight starts as it was if it was orthogonal, else as the Q factor of its QR decomposition. It
        can be assigned (`module.weight = W`) in the same way, and assigning the weight to itself is how the
        parameter is brought back near the origin after long training: see `rebase`.

    Raises:
        ValueError: there is no such tensor, it has fewer than two dimensions, or the map is unknown. TypeError: it is
        complex; torch's own function serves those.

    Average models by their weights, or by their parameters where they started from the same signs.

    >>> layer = rom.nn.orthogonal(torch.nn.Linear(20, 40))
    >>> bool(rom.ops.orthogonality_error(layer.weight) < 1e-5)
    True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"rom.nn.orthogonal: expected a parameter or buffer named {name!r} in {module}, found none.")
    if weight.dim() < 2:
        raise ValueError(f"rom.nn.orthogonal: expected a matrix or a batch of them, got shape {tuple(weight.shape)}.")
    if weight.is_complex() or not weight.is_floating_point():
        raise TypeError(
            f"rom.nn.orthogonal: expected a real floating weight, got {weight.dtype}. "
            f"torch.nn.utils.parametrizations.orthogonal takes complex ones."
        )
    if orthogonal_map is None:
        orthogonal_map = "cayley" if weight.shape[-2] == weight.shape[-1] else "householder"
    if orthogonal_map not in MAPS:
        raise ValueError(f"rom.nn.orthogonal: expected orthogonal_map one of {MAPS} or None, got {orthogonal_map!r}.")
    parametrize.register_parametrization(
        module, name, Orthogonal(weight, orthogonal_map, use_trivialization), unsafe=True
    )
    return module


def rebase(module: nn.Module, name: str = "weight") -> None:
    """Chooses new parameters for the same weight, near the origin of its map.

    Far from it (long training; ‖A/2‖ above 10) Cayley's gradients flatten and rounding grows. The optimiser's moments
    belong to the old parameters: reset them.

    >>> layer = rom.nn.OrthogonalLinear(8, 8)
    >>> rom.nn.rebase(layer)
    """
    setattr(module, name, getattr(module, name).detach())


class Orthogonal(nn.Module):
    """The parametrization behind `orthogonal`: maps the parameter to Q, and a given Q back to a parameter."""

    signs: torch.Tensor
    base: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, orthogonal_map: str, use_trivialization: bool = True) -> None:
        super().__init__()
        self.orthogonal_map, self.shape = orthogonal_map, weight.shape
        if orthogonal_map in _INVERSES:
            # floating, so that .half() or an average touches them like the weight; their magnitude means nothing
            self.register_buffer("signs", weight.new_ones(*weight.shape[:-2], min(weight.shape[-2:])))
        if orthogonal_map == "matrix_exp" and use_trivialization:
            self.register_buffer("base", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q, in x's dtype."""
        if self.orthogonal_map in _INVERSES:
            return getattr(ops, self.orthogonal_map)(x, self.signs)
        wide = x.shape[-2] < x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            tall = (x.mT if wide else x).to(torch.promote_types(x.dtype, torch.float32))
            q = _qr(tall) if self.orthogonal_map == "qr" else self._exp(tall)
        return (q.mT if wide else q).to(x.dtype)

    def _exp(self, x: torch.Tensor) -> torch.Tensor:
        n, k = x.shape[-2:]
        lower = nn.functional.pad(x.tril(), (0, n - k))
        q = torch.matrix_exp(lower - lower.mT)[..., :k]
        base = getattr(self, "base", None)
        if base is None:
            return q
        if base.dtype != q.dtype:  # rounded to 16 bits it is orthogonal to 1e-2 at best: two steps repair it
            base = polish(polish(base.to(q.dtype)))
        return base @ q

    @torch.no_grad()
    def right_inverse(self, q: torch.Tensor) -> torch.Tensor:
        """The parameter whose Q is q (made orthogonal first); writes signs or base."""
        if q.shape != self.shape:
            raise ValueError(
                f"rom.nn.orthogonal: expected a weight of shape {tuple(self.shape)}, got {tuple(q.shape)}."
            )
        wide = q.shape[-2] < q.shape[-1]
        tall = _qr((q.mT if wide else q).double())  # leaves what is orthogonal as it is
        exact = tall.mT if wide else tall
        if self.orthogonal_map in _INVERSES:
            x, signs = _INVERSES[self.orthogonal_map](exact)
            self.signs.copy_(signs)
            return x.to(q.dtype)
        if self.orthogonal_map == "qr":
            return exact.to(q.dtype).contiguous()
        if not hasattr(self, "base"):
            raise NotImplementedError(
                "rom.nn.orthogonal: matrix_exp without trivialization cannot be assigned to. Use another map, or "
                "use_trivialization=True."
            )
        n, k = tall.shape[-2:]
        completion = tall.new_empty(*tall.shape[:-1], n - k).normal_()
        self.base = _qr(torch.cat((tall, completion), -1)).to(q.dtype)
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """The map."""
        return self.orthogonal_map


def _qr(x: torch.Tensor) -> torch.Tensor:
    """The Q of x = QR with a positive diagonal of R: unique, and x itself if its columns are orthonormal."""
    q, r = torch.linalg.qr(x)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


class OrthogonalLinear(nn.Linear):
    """nn.Linear whose weight `[out_features, in_features]` is orthogonal: orthonormal columns, or rows if it is wide.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear. The weight starts uniformly distributed over
            the orthogonal matrices, the bias at zero.
        orthogonal_map: as in `orthogonal`.

    The weight is computed in every forward pass; `with torch.nn.utils.parametrize.cached():` computes it once.

    >>> layer = rom.nn.OrthogonalLinear(16, 16, bias=False)
    >>> x = torch.randn(4, 16)
    >>> torch.allclose(layer(x).norm(dim=-1), x.norm(dim=-1), atol=1e-4)  # a rotation
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        orthogonal_map: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        orthogonal(self, "weight", orthogonal_map)

    def reset_parameters(self) -> None:
        """A new weight, uniformly distributed over the orthogonal matrices, and a zero bias."""
        with torch.no_grad():
            start = torch.empty_like(self.weight, dtype=torch.promote_types(self.weight.dtype, torch.float32))
            start.normal_()  # the Q of a Gaussian matrix is uniform
            if parametrize.is_parametrized(self, "weight"):
                self.weight = start.to(self.weight.dtype)
            else:
                self.weight.copy_(start)
            if self.bias is not None:
                self.bias.zero_()
