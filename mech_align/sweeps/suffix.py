"""Interventions on the part of the network that they can change, and on nothing else.

For a batch of prompts:

1. One pass over the undisturbed run keeps what each layer from the lowest edited one up hands on (``Undisturbed``).
2. Cells that enter at the same place travel together as ``[prompt, cell, window]``: from the edited layer up, from the
   first edited position on. What is before a window is shared by all its cells, keys and values included.
3. In the last layer only the metric position's query is followed, and only the columns of the unembedding that the
   metric reads are computed, in fp32.

Equal to a full forward pass for each cell: nothing is approximated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mech_align.errors import PatchDidNotFire
from mech_align.interventions import Intervention
from mech_align.models.decoder import Decoder, DecoderLayer, causal_mask
from mech_align.sites import PARTS

Values = Mapping[tuple[int, str], Tensor]
ORDER = {part: rank for rank, part in enumerate(PARTS)}
_KEPT = ("resid_pre", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Placed:
    """One intervention, with its positions and source values settled for a batch of prompts.

    Attributes:
        mask: Which positions of which prompt it changes.
        source: Value name in the batch's sources.
    """

    intervention: Intervention
    mask: Bool[Tensor, "b t"]

    @property
    def layer(self) -> int:
        return self.intervention.site.layer

    @property
    def part(self) -> str:
        return self.intervention.site.part


PlacedCell = Sequence[Placed]


def undisturbed(
    decoder: Decoder,
    ids: Int[Tensor, "b t"],
    *,
    keep: Callable[[int, str], bool],
    n_layers: int | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Run the decoder and keep the chosen activations, each ``[b, t, ...]``; stop after ``n_layers``."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    x = decoder.embed(ids, positions)
    kept: dict[tuple[int, str], Tensor] = {}

    def note(index: int, part: str, value: Tensor) -> None:
        if keep(index, part):
            kept[index, part] = value

    layers = decoder.layers[:n_layers]
    for index, layer in enumerate(layers):
        x, positions = x.to(layer.device), positions.to(layer.device)
        note(index, "resid_pre", x)
        q, k, v = layer.qkv(x, positions)
        for part, value in (("q", q), ("k", k), ("v", v)):
            note(index, part, value)
        see = (lambda p, i=index: (note(i, "pattern", p[:, 0]), p)[1]) if keep(index, "pattern") else None
        z = layer.attend(q[:, None], k[:, None], v[:, None], None, see)[:, 0]
        note(index, "z", z)
        attn = layer.attn_out(z)
        note(index, "attn_out", attn)
        middle = x + attn
        if not layer.parallel:
            note(index, "resid_mid", middle)
        if layer.mlp is not None:
            hidden = layer.mlp_hidden(x if layer.parallel else middle)
            note(index, "mlp_post", hidden)
            out = layer.mlp_out(hidden)
            note(index, "mlp_out", out)
            x = middle + out
        else:
            x = middle
        note(index, "resid_post", x)
    return kept


class SuffixEngine:
    """Scores of a batch of prompts under many cells of interventions.

    Args:
        last: The metric position of each prompt.
        sources: By source name, the values of another run at the positions of this one.
        score: ``(resid [b, c, d]) -> [b, c]``, from the final residual stream at the metric position.
        lowest: The lowest layer that a cell edits.
        row_budget: How many rows of the residual stream may travel at once; bounds the memory.
        base: The undisturbed run, where another engine on the same prompts already has it.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids: Int[Tensor, "b t"],
        last: Int[Tensor, " b"],
        sources: Mapping[str, Values],
        score: Callable[[Float[Tensor, "b c d"]], Float[Tensor, "b c"]],
        *,
        lowest: int = 0,
        row_budget: int = 1024,
        base: dict[tuple[int, str], Tensor] | None = None,
    ) -> None:
        self.decoder, self.ids, self.last, self.sources, self.score = decoder, ids, last, sources, score
        self.row_budget = row_budget
        top = len(decoder.layers) - 1
        self.base = base or undisturbed(
            decoder, ids, keep=lambda index, part: part in _KEPT and (index >= lowest or index == top)
        )

    def baseline(self) -> Float[Tensor, " b"]:
        """The score of the undisturbed run."""
        return self.score(self.final()[:, None])[:, 0]

    def final(self) -> Float[Tensor, "b d"]:
        """The undisturbed residual stream above the last layer, at the metric position."""
        value = self.base[len(self.decoder.layers) - 1, "resid_post"]
        last = self.last.to(value.device)
        return value[torch.arange(len(last), device=value.device), last]

    def run(self, cells: Sequence[PlacedCell]) -> Float[Tensor, "b cell"]:
        """Scores under cells that travel together, in their order."""
        return _Window(self, cells).score()

    def chunks(self, cells: Sequence[PlacedCell]) -> Iterator[list[int]]:
        """Numbers of cells that enter at one place and need about the same positions, as many as fit the budget."""
        top = len(self.decoder.layers) - 1
        keyed: list[tuple[tuple[int, int, int, int], int]] = []
        for number, cell in enumerate(cells):
            first = min(cell, key=lambda e: (e.layer, ORDER[e.part]))
            simple = min(len(cell), 2)
            late = first.layer == top and ORDER[first.part] >= ORDER["z"]
            start = 0 if late else int(_first(first_mask(cell)).min())
            keyed.append(((first.layer, ORDER[first.part], simple, start), number))
        keyed.sort()
        chunk: list[int] = []
        head: tuple[int, int, int, int] | None = None
        spent = 0
        for key, number in keyed:
            rows = len(self.ids) * (1 if _late(key, top) else self.ids.shape[1] - key[3])
            together = head is not None and key[:3] == head[:3]
            # Cells that start later travel with an earlier one only where the waste is small.
            near = head is not None and (key[3] - head[3]) * 16 <= self.ids.shape[1] - head[3]
            if chunk and not (together and near and spent + rows <= self.row_budget):
                yield chunk
                chunk, spent, head = [], 0, None
            head = head or key
            chunk.append(number)
            spent += rows
        if chunk:
            yield chunk


def _late(key: tuple[int, int, int, int], top: int) -> bool:
    return key[0] == top and key[1] >= ORDER["z"]


def first_mask(cell: PlacedCell) -> Bool[Tensor, "b t"]:
    """Positions that any edit of a cell changes; all of them where it edits an attention pattern."""
    mask = cell[0].mask
    for edit in cell[1:]:
        mask = mask | edit.mask
    return torch.ones_like(mask) if any(edit.part == "pattern" for edit in cell) else mask


def _first(mask: Bool[Tensor, "b t"]) -> Int[Tensor, " b"]:
    """First position that is set; the number of positions where none is."""
    found = mask.any(-1)
    return torch.where(found, mask.int().argmax(-1), mask.shape[-1])


class _Window:
    """Cells on their way up: for each prompt the positions from its first edited one to the end."""

    def __init__(self, engine: SuffixEngine, cells: Sequence[PlacedCell]) -> None:
        self.engine, self.cells = engine, cells
        self.layers = engine.decoder.layers
        self.top = len(self.layers) - 1
        self.edits: dict[tuple[int, str], list[tuple[int, Placed]]] = {}
        self.fired: set[tuple[int, str]] = set()
        for number, cell in enumerate(cells):
            for edit in cell:
                self.edits.setdefault((edit.layer, edit.part), []).append((number, edit))
        self.entry = min((layer, ORDER[part]) for layer, part in self.edits)
        start = torch.stack([_first(first_mask(cell)) for cell in cells]).amin(0)
        self._settle(torch.minimum(start, engine.last))
        if self.entry[0] == self.top and self.entry[1] >= ORDER["z"]:
            self._settle(engine.last, single=True)

    def _settle(self, start: Int[Tensor, " b"], *, single: bool = False) -> None:
        self.start = start
        width = 1 if single else int((self.engine.last - start).max()) + 1
        steps = torch.arange(width, device=start.device)
        self.positions = (start[:, None] + steps).clamp_max(self.engine.ids.shape[1] - 1)
        self.whole = width == self.engine.ids.shape[1] and not bool(start.any())
        self.single = single

    def score(self) -> Float[Tensor, "b c"]:
        x: Tensor | None = None
        for index in range(self.entry[0], self.top + 1):
            x = self._step(index, x)
        assert x is not None
        if self.fired != self.edits.keys():
            raise PatchDidNotFire(f"edits at {sorted(self.edits.keys() - self.fired)} were not reached")
        last = x[:, :, 0] if self.single else _pick(x, self.engine.last.to(x.device) - self.start.to(x.device))
        return self.engine.score(last.expand(-1, len(self.cells), -1))

    def _base(self, index: int, part: str) -> Float[Tensor, "b 1 w ..."]:
        value = self.engine.base[index, part]
        return self._cut(value)[:, None]

    def _cut(self, value: Shaped[Tensor, "b t ..."]) -> Shaped[Tensor, "b w ..."]:
        if self.whole:
            return value
        rows = torch.arange(len(value), device=value.device)[:, None]
        return value[rows, self.positions.to(value.device)]

    def _step(self, index: int, x: Tensor | None) -> Float[Tensor, "b c w d"]:
        layer = self.layers[index]
        entering = x is None
        rank = self.entry[1] if entering else 0
        if x is not None:
            x = x.to(layer.device)
        shift: Tensor | None = None
        if rank < ORDER["z"]:
            x = self._edited(index, "resid_pre", self._base(index, "resid_pre") if x is None else x)
            z, x = self._attention(index, layer, x)
            attn = layer.attn_out(self._edited(index, "z", z))
        else:
            x = self._base(index, "resid_pre")
            attn = self._base(index, "attn_out")
            if rank == ORDER["z"]:
                shift = None if layer.post_attn is not None else self._shift(index, "z", layer.output.weight)
                attn = (
                    attn + shift
                    if shift is not None
                    else layer.attn_out(self._edited(index, "z", self._base(index, "z")))
                )
        if rank <= ORDER["attn_out"]:
            attn = self._edited(index, "attn_out", attn)
        return self._mlp(index, layer, x, attn, rank)

    def _mlp(self, index: int, layer: DecoderLayer, x: Tensor, attn: Tensor, rank: int) -> Float[Tensor, "b c w d"]:
        untouched = rank > ORDER["resid_mid"]
        if layer.parallel or not untouched:
            middle = x + attn
        else:
            middle = self._base(index, "resid_mid")
        if not layer.parallel and not untouched:
            middle = self._edited(index, "resid_mid", middle)
        if layer.mlp is None:
            return self._edited(index, "resid_post", middle)
        if rank == ORDER["resid_post"]:
            return self._edited(index, "resid_post", self._base(index, "resid_post"))
        if rank >= ORDER["mlp_out"] or (layer.parallel and rank in (ORDER["z"], ORDER["attn_out"])
                                        and (index, "mlp_post") not in self.edits):  # fmt: skip
            out = self._base(index, "mlp_out")
        elif rank == ORDER["mlp_post"] and layer.post_mlp is None:
            shift = self._shift(index, "mlp_post", layer.mlp.down.weight)
            reads = self._base(index, "resid_pre" if layer.parallel else "resid_mid")
            out = (
                self._base(index, "mlp_out") + shift
                if shift is not None
                else layer.mlp_out(self._edited(index, "mlp_post", layer.mlp_hidden(reads)))
            )
        else:
            hidden = layer.mlp_hidden(x if layer.parallel else middle)
            out = layer.mlp_out(self._edited(index, "mlp_post", hidden))
        return self._edited(index, "resid_post", middle + self._edited(index, "mlp_out", out))

    def _attention(self, index: int, layer: DecoderLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` of the window, and the window's stream; both narrowed to the metric position in the last layer."""
        b, c, w, _ = x.shape
        positions = self.positions.to(x.device)
        q, k, v = (
            t.unflatten(0, (b, c)) for t in layer.qkv(x.flatten(0, 1), positions[:, None].expand(b, c, w).flatten(0, 1))
        )
        q, k, v = (self._edited(index, part, t) for part, t in (("q", q), ("k", k), ("v", v)))
        c = max(q.shape[1], k.shape[1], v.shape[1])
        q, k, v = (t.expand(-1, c, -1, -1, -1) for t in (q, k, v))
        start = self.start.to(x.device)
        prefix = int(start.max())
        patterns = (lambda p: self._edited_pattern(index, p)) if (index, "pattern") in self.edits else None
        narrow = index == self.top and not self.single and patterns is None
        queries = positions
        if narrow:
            offset = self.engine.last.to(x.device) - start
            q, x, queries = (
                _pick(q, offset)[:, :, None],
                _pick(x, offset)[:, :, None],
                self.engine.last.to(x.device)[:, None],
            )
        steps = torch.arange(w, device=x.device)
        if prefix == 0:
            allowed = causal_mask(queries, steps, layer.window) if narrow else None
            z = layer.attend(q, k, v, allowed, patterns)
        else:
            keys = torch.arange(prefix, device=x.device)
            before = causal_mask(queries, keys, layer.window) & (keys[None, None] < start[:, None, None])
            inside = queries[:, :, None] - (start[:, None] + steps)[:, None, :]
            within = (inside >= 0) & (inside < (layer.window or inside.shape[-1] + prefix))
            past = [self.engine.base[index, part][:, :prefix] for part in ("k", "v")]
            z = layer.attend_after(q, k, v, past[0], past[1], torch.cat((before, within), -1))
        if narrow:
            self._settle(self.engine.last, single=True)
        return z, x

    def _edited(self, index: int, part: str, value: Float[Tensor, "b c w ..."]) -> Tensor:
        """The value after the edits of this site; cells without one keep theirs."""
        edits = self.edits.get((index, part))
        if not edits:
            return value
        self.fired.add((index, part))
        value = value.expand(-1, len(self.cells), *value.shape[2:]).clone()
        for number, edit in edits:
            current = value[:, number]
            where = edit.intervention.index
            old = current if where is None else current[:, :, list(where)]
            new = torch.where(self._mask(edit, old), self._new(edit, old), old)
            if where is None:
                value[:, number] = new
            else:
                current[:, :, list(where)] = new
        return value

    def _edited_pattern(self, index: int, value: Float[Tensor, "b c head w j"]) -> Tensor:
        edits = self.edits[index, "pattern"]
        self.fired.add((index, "pattern"))
        value = value.expand(-1, len(self.cells), *value.shape[2:]).clone()
        for number, edit in edits:
            heads = list(edit.intervention.index or range(value.shape[2]))
            old = value[:, number, heads]
            source = self._source(edit)
            new = edit.intervention.edit.apply(old, None if source is None else source[:, heads])
            value[:, number, heads] = torch.where(edit.mask.to(old.device)[:, None, :, None], new, old)
        return value

    def _shift(self, index: int, part: str, weight: Float[Tensor, "d inner"]) -> Float[Tensor, "b c w d"] | None:
        """What edits of a few heads or neurons each add to the stream, without forming the whole activation again.

        ``None`` where the cells are not all of that one form.
        """
        edits = self.edits[index, part]
        first = edits[0][1].intervention
        size = None if first.index is None else len(first.index)
        alike = all(e.intervention.edit == first.edit and e.intervention.source == first.source
                    and e.intervention.index is not None and len(e.intervention.index) == size
                    for _, e in edits)  # fmt: skip
        if size is None or not alike or len(edits) != len(self.cells):
            return None
        self.fired.add((index, part))
        which = torch.tensor([e.intervention.index for _, e in edits], device=weight.device)  # [c, k]
        base = self._cut(self._inner(index, part))  # [b, w, head|neuron, ...]
        old = base[:, :, which]  # [b, w, c, k, ...]
        source = self._source(edits[0][1])
        new = first.edit.apply(old, None if source is None else source[:, :, which].to(old.device))
        masks = torch.stack([self._cut(e.mask.to(old.device)) for _, e in edits], dim=2)  # [b, w, c]
        gap = torch.where(masks.reshape(*masks.shape, *[1] * (old.ndim - 3)), new - old, 0)
        columns = weight.T.unflatten(0, (base.shape[2], -1))[which]  # [c, k, inner, d]
        gap = gap.reshape(*gap.shape[:4], -1)
        return torch.einsum("bwcki,ckid->bcwd", gap, columns)

    def _inner(self, index: int, part: str) -> Tensor:
        base = self.engine.base
        if (index, part) not in base:
            layer = self.layers[index]
            base[index, part] = layer.mlp_hidden(base[index, "resid_pre" if layer.parallel else "resid_mid"])
        return base[index, part]

    def _mask(self, edit: Placed, like: Tensor) -> Tensor:
        mask = self._cut(edit.mask.to(like.device))
        return mask.reshape(*mask.shape, *[1] * (like.ndim - 2))

    def _source(self, edit: Placed) -> Tensor | None:
        if not edit.intervention.edit.needs_source:
            return None
        value = self.engine.sources[edit.intervention.source][edit.layer, edit.part]
        return value if edit.part == "pattern" else self._cut(value)

    def _new(self, edit: Placed, old: Tensor) -> Tensor:
        source = self._source(edit)
        where = edit.intervention.index
        if source is not None and where is not None:
            source = source[:, :, list(where)]
        return edit.intervention.edit.apply(old, None if source is None else source.to(old.device))


def _pick(value: Float[Tensor, "b c w ..."], offset: Int[Tensor, " b"]) -> Float[Tensor, "b c ..."]:
    return value[torch.arange(len(value), device=value.device), :, offset]
