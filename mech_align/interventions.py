"""Disturbances of a forward pass: where, at which positions, and what the new value is. Edits are pure functions."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.sites import Site


@dataclass(frozen=True)
class Edit:
    """A pure function of an activation: ``(current, source) -> new``, last axis = the activation's own.

    Attributes:
        name: As shown in provenance.
        apply: Returns a new tensor, never writes into ``current``. ``source`` is the same site in another run, at the
            aligned position; ``None`` when the edit needs no source.
        needs_source: Whether a source value must be at hand.
        detail: What tells edits of one name apart (a digest of the vector that is added, say), so that unfinished work
            is not taken up with another edit.
    """

    name: str
    apply: Callable[[Tensor, Tensor | None], Tensor]
    needs_source: bool = False
    detail: str = ""


def patch() -> Edit:
    """Put in the value of the source run."""
    return Edit("patch", _take_source, needs_source=True)


def zero() -> Edit:
    """Put in zero."""
    return Edit("zero", _put_zero)


def add(vector: Float[Tensor, " d"], scale: float = 1.0) -> Edit:
    """Add ``scale`` times a vector."""
    return Edit("add", lambda current, _: current + scale * vector.to(current), detail=f"{scale} x {_digest(vector)}")


def add_source() -> Edit:
    """Add the value of the source (noise, for instance)."""
    return Edit("add_source", _add_source, needs_source=True)


def project_out(vector: Float[Tensor, " d"]) -> Edit:
    r"""Remove the component along a vector: $x - \hat v (\hat v^\top x)$.

    Reference:
        Arditi et al. 2024, arXiv:2406.11717, section 2.4 (directional ablation).
    """
    unit = vector / vector.norm()

    def apply(current: Tensor, _: Tensor | None) -> Tensor:
        direction = unit.to(current)
        return current - (current @ direction).unsqueeze(-1) * direction

    return Edit("project_out", apply, detail=_digest(vector))


def _digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.detach().double().cpu().numpy().tobytes()).hexdigest()[:16]


def _put_zero(current: Tensor, _: Tensor | None) -> Tensor:
    return torch.zeros_like(current)


def _add_source(current: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        raise ValueError("add_source needs the value of a source")
    return current + source.to(current)


def _take_source(current: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        raise ValueError("patch needs the value of a source run")
    return source.to(current)


@dataclass(frozen=True)
class Intervention:
    """One edit at one site.

    Attributes:
        site: Layer and part; a head or neuron of it, or all of the part when neither is named.
        edit: What becomes of the activation.
        positions: ``"all"``, ``"last"``, or a named position of the pairs (``"differs"``, a name of the user's).
        neurons: A set of neurons of ``mlp_post`` that are edited together, in place of ``site.neuron``.
        source: Under which name the sweep's sources hold the value, when the edit needs one.
    """

    site: Site
    edit: Edit
    positions: str | int = "all"
    neurons: tuple[int, ...] = ()
    source: str = "source"

    def __post_init__(self) -> None:
        if self.neurons and (self.site.part != "mlp_post" or self.site.neuron is not None):
            raise ValueError("a neuron set belongs to a site such as Site(3, 'mlp_post')")

    @property
    def index(self) -> tuple[int, ...] | None:
        """Which heads or neurons of the part are edited; ``None`` for all of it."""
        if self.neurons:
            return self.neurons
        if self.site.neuron is not None:
            return (self.site.neuron,)
        return None if self.site.head is None else (self.site.head,)

    def __str__(self) -> str:
        where = f"{self.site}" if not self.neurons else f"L{self.site.layer}N[{len(self.neurons)}]"
        return f"{self.edit.name} {where} at {self.positions}"
