"""Addresses inside a transformer: one grammar for layers, parts, heads and neurons."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from mech_align.errors import UnknownSite

PARTS = (
    "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
"""Activations of one layer, in the order in which a forward pass makes them.

``z`` is the input of the attention output projection, ``mlp_post`` the input of the MLP's down projection; ``q`` and
``k`` are what enters the dot product, after any normalisation and rotation.
"""

HEAD_PARTS = ("q", "k", "v", "pattern", "z")
_SHORT = {"attn": "attn_out", "mlp": "mlp_out", "resid": "resid_post", "neurons": "mlp_post", "heads": "z"}
_SITE = re.compile(r"^L(?P<layer>\d+)(?:H(?P<head>\d+)|N(?P<neuron>\d+))?(?:\.(?P<part>[a-z_]+))?$", re.IGNORECASE)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that an address is checked against."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True)
class Site:
    """Where in the network: a part of a layer, or one head or neuron of it. Counts start at 0.

    ``str(site)`` and ``Site.parse`` are inverse: ``L10H7`` (what head 7 of layer 10 hands to the output projection),
    ``L10H7.q``, ``L3.mlp``, ``L3.attn``, ``L5.resid_post``, ``L3N17`` (neuron 17 of the MLP of layer 3).
    """

    layer: int
    part: str
    head: int | None = None
    neuron: int | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise _unknown_part(self.part)
        if self.head is not None and self.part not in HEAD_PARTS:
            raise UnknownSite(f"{self.part} has no heads", hint=f"parts with heads: {', '.join(HEAD_PARTS)}")
        if self.neuron is not None and self.part != "mlp_post":
            raise UnknownSite(f"{self.part} has no neurons", hint="neurons live in mlp_post, written L3N17")

    def __str__(self) -> str:
        if self.neuron is not None:
            return f"L{self.layer}N{self.neuron}"
        if self.head is not None:
            return f"L{self.layer}H{self.head}" + ("" if self.part == "z" else f".{self.part}")
        return f"L{self.layer}.{ {'attn_out': 'attn', 'mlp_out': 'mlp'}.get(self.part, self.part) }"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read an address such as ``L10H7`` or ``L3.mlp``.

        Raises:
            UnknownSite: The text is no address, or names a part that does not exist.
        """
        match = _SITE.match(text.strip())
        if match is None:
            raise UnknownSite(
                f"'{text}' is not an address in the model",
                hint="write L10H7 for a head, L3.mlp, L3.attn or L5.resid_post for a part, L3N17 for a neuron",
            )
        part = match["part"] and _SHORT.get(match["part"].lower(), match["part"].lower())
        if match["neuron"] is not None:
            return cls(int(match["layer"]), part or "mlp_post", neuron=int(match["neuron"]))
        if match["head"] is not None:
            return cls(int(match["layer"]), part or "z", head=int(match["head"]))
        if part is None:
            raise UnknownSite(
                f"'{text}' names a layer but no part of it", hint=f"for instance {text}.mlp, {text}.attn or {text}H0"
            )
        return cls(int(match["layer"]), part)

    def check(self, shape: ModelShape) -> "Site":
        """Return the site itself when the model has it.

        Raises:
            UnknownSite: Says which count is too high, the range, and the nearest address that exists.
        """
        wrong: list[str] = []
        if not 0 <= self.layer < shape.n_layers:
            wrong.append(f"layers are 0 to {shape.n_layers - 1}")
        heads = shape.n_kv_heads if self.part in ("k", "v") else shape.n_heads
        if self.head is not None and not 0 <= self.head < heads:
            kind = "key-value heads" if self.part in ("k", "v") else "heads"
            wrong.append(f"{kind} are 0 to {heads - 1}")
        if self.neuron is not None and not 0 <= self.neuron < shape.d_mlp:
            wrong.append(f"neurons are 0 to {shape.d_mlp - 1}")
        if wrong:
            near = Site(
                min(self.layer, shape.n_layers - 1),
                self.part,
                None if self.head is None else min(self.head, heads - 1),
                None if self.neuron is None else min(self.neuron, shape.d_mlp - 1),
            )
            raise UnknownSite(
                f"no {self} in this model", why="; ".join(wrong) + "; both count from 0", hint=f"did you mean {near}?"
            )
        return self


def parse_sites(text: str | Iterable[str | Site], shape: ModelShape | None = None) -> list[Site]:
    """Read a comma-separated list of addresses, checked against ``shape`` when it is given."""
    items = text.split(",") if isinstance(text, str) else list(text)
    sites = [
        item if isinstance(item, Site) else Site.parse(item) for item in items if isinstance(item, Site) or item.strip()
    ]
    if not sites:
        raise UnknownSite("no address given", hint="for instance L10H7,L10H3")
    if shape is not None:
        sites = [site.check(shape) for site in sites]
    return list(dict.fromkeys(sites))


def parse_layers(text: str | Iterable[int] | None, n_layers: int) -> list[int]:
    """Read ``"62,63"``, ``"0-5"``, ``"-2"`` (second from the top), ``"all"``, or a list of numbers.

    Raises:
        UnknownSite: Not a number or range, or outside the model.
    """
    if text is None or text == "all":
        return list(range(n_layers))
    layers: list[int] = []
    for item in text.split(",") if isinstance(text, str) else text:
        word = str(item).strip()
        span = re.fullmatch(r"(\d+)\s*(?:-|\.\.)\s*(\d+)", word)
        if span:
            low, high = int(span[1]), int(span[2])
            layers.extend(range(low, high + 1) if low <= high else [n_layers])
        elif re.fullmatch(r"-?\d+", word):
            layers.append(int(word) + (n_layers if word.startswith("-") else 0))
        elif word:
            raise UnknownSite(f"'{word}' is no layer", hint="write 62,63 or 0-5 or all")
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise UnknownSite(
                f"no layer {layer} in this model (asked for: {text})",
                why=f"layers are 0 to {n_layers - 1}, counted from 0",
                hint=f"the last two are {max(n_layers - 2, 0)},{n_layers - 1}",
            )
    if not layers:
        raise UnknownSite("no layer given", hint="write 62,63 or 0-5 or all")
    return sorted(set(layers))


def part_name(text: str) -> str:
    """The full name of a part, from a short or full one (``mlp`` → ``mlp_out``)."""
    name = _SHORT.get(text, text)
    if name not in PARTS:
        raise _unknown_part(text)
    return name


def _unknown_part(text: str) -> UnknownSite:
    near = get_close_matches(text, [*PARTS, *_SHORT], n=3)
    return UnknownSite(
        f"no part '{text}' in a layer",
        hint=(f"did you mean {', '.join(near)}?" if near else f"parts: {', '.join(PARTS)}"),
    )
