"""One decoder layer as plain functions of tensors, so that a sweep can start in the middle of a network.

The weights are those of the wrapped model (views wherever the layout allows), read off by ``models/weights.py``. Every
function works on windows of positions: the residual stream of a few positions goes in, with the keys and values of the
positions before them. A causal decoder needs nothing else, so nothing below a patch and nothing before it is
recomputed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm over the last axis; the identity when ``kind`` is ``"none"``.

    ``offset`` is added to the weight (Gemma stores the weight minus one). RMSNorm is computed in fp32, as both
    TransformerLens and Hugging Face do.
    """

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "layer":
            weight = None if self.weight is None else self.weight.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * (self.weight.float() + self.offset)
        return wide.to(x.dtype)

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        """What the (centred) input is divided by, in fp32; direct logit attribution freezes it."""
        wide = x.float()
        if self.kind == "none":
            return torch.ones_like(wide[..., :1])
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding as tables over positions; ``adjacent`` pairs neighbours (GPT-J) and not halves."""

    cos: Float[Tensor, "position rotated"]
    sin: Float[Tensor, "position rotated"]
    adjacent: bool = False

    def __call__(self, x: Float[Tensor, "n w head d_head"], positions: Int[Tensor, "n w"]) -> Tensor:
        size = self.cos.shape[-1]
        cos = self.cos[positions].unsqueeze(-2).to(x.dtype)
        sin = self.sin[positions].unsqueeze(-2).to(x.dtype)
        turn, rest = x[..., :size], x[..., size:]
        if self.adjacent:
            turned = torch.stack((-turn[..., 1::2], turn[..., ::2]), dim=-1).flatten(-2)
        else:
            turned = torch.cat((-turn[..., size // 2 :], turn[..., : size // 2]), dim=-1)
        out = turn * cos + turned * sin
        return out if rest.shape[-1] == 0 else torch.cat((out, rest), dim=-1)


@dataclass(frozen=True)
class Linear:
    """``x W^T + b`` with the weight as ``[out, in]`` (a view, where the model stores it the other way round)."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Mlp:
    """An MLP, gated or not: ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``."""

    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    gate: Linear | None = None
    hidden_bias: Tensor | None = None

    def hidden(self, x: Tensor) -> Tensor:
        """What enters the down projection (``mlp_post``)."""
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return hidden if self.hidden_bias is None else hidden + self.hidden_bias


@dataclass(frozen=True)
class DecoderLayer:
    """The functions of one layer. ``n`` rows, ``w`` positions each.

    ``post_attn`` and ``post_mlp`` normalise what a block writes (Gemma 2, 3). ``parallel``: the MLP reads the layer's
    input and not the middle of it (GPT-NeoX).
    """

    norm1: Norm
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    n_heads: int
    n_kv_heads: int
    scale: float
    norm2: Norm
    mlp: Mlp | None
    rotary: Rotary | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    post_attn: Norm | None = None
    post_mlp: Norm | None = None
    softcap: float | None = None
    window: int | None = None
    parallel: bool = False

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.query.weight.device

    def qkv(
        self, x: Float[Tensor, "n w d"], positions: Int[Tensor, "n w"]
    ) -> tuple[Float[Tensor, "n w head d_head"], Float[Tensor, "n w kv d_head"], Float[Tensor, "n w kv d_head"]]:
        """Query, key and value as they enter the dot product."""
        x = self.norm1(x)
        q = self.query(x).unflatten(-1, (self.n_heads, -1))
        k = self.key(x).unflatten(-1, (self.n_kv_heads, -1))
        v = self.value(x).unflatten(-1, (self.n_kv_heads, -1))
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def attend(
        self,
        q: Float[Tensor, "b c w head d_head"],
        k: Float[Tensor, "b c j kv d_head"],
        v: Float[Tensor, "b c j kv d_head"],
        allowed: Bool[Tensor, "b w j"] | None,
        edit_pattern: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "b _ w head d_head"]:
        """Attention of windows to keys; ``allowed`` None means plain causal over equal windows."""
        b, c, w = q.shape[:3]
        if allowed is None and self.softcap is None and self.window is None and edit_pattern is None:
            query, keys, values = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
            z = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self.scale, enable_gqa=self.n_heads != self.n_kv_heads
            )
            return z.transpose(1, 2).unflatten(0, (b, c))
        if allowed is None:
            steps = torch.arange(w, device=q.device)
            allowed = causal_mask(steps.expand(b, w), steps, self.window)
        grouped = q.unflatten(3, (self.n_kv_heads, -1))
        scores = torch.einsum("bcwgrd,bcjgd->bcgrwj", grouped, k)
        pattern = self._softmax(scores, allowed[:, None, None, None])
        if edit_pattern is not None:
            pattern = edit_pattern(pattern.flatten(2, 3)).unflatten(2, (self.n_kv_heads, -1))
        return torch.einsum("bcgrwj,bcjgd->bcwgrd", pattern, v).flatten(3, 4)  # edited patterns may bring more cells

    def attend_after(
        self,
        q: Float[Tensor, "b c w head d_head"],
        k: Float[Tensor, "b c n kv d_head"],
        v: Float[Tensor, "b c n kv d_head"],
        past_k: Float[Tensor, "b j kv d_head"],
        past_v: Float[Tensor, "b j kv d_head"],
        allowed: Bool[Tensor, "b w j+n"],
    ) -> Float[Tensor, "b c w head d_head"]:
        """Attention of windows to a past that all cells of a prompt share (never copied) and to themselves."""
        b, c, w, heads, _ = q.shape
        past = past_k.shape[1]
        grouped = q.unflatten(3, (self.n_kv_heads, -1))
        before = torch.einsum("bcwgrd,bjgd->bcgrwj", grouped, past_k)
        inside = torch.einsum("bcwgrd,bcjgd->bcgrwj", grouped, k)
        pattern = self._softmax(torch.cat((before, inside), dim=-1), allowed[:, None, None, None])
        z = torch.einsum("bcgrwj,bjgd->bcwgrd", pattern[..., :past], past_v)
        z = z + torch.einsum("bcgrwj,bcjgd->bcwgrd", pattern[..., past:], v)
        return z.reshape(b, c, w, heads, -1)

    def _softmax(self, scores: Tensor, allowed: Tensor) -> Tensor:
        wide = scores.float() * self.scale
        if self.softcap is not None:
            wide = self.softcap * torch.tanh(wide / self.softcap)
        # A pad row may see nothing at all; it is never read, and must not become NaN.
        wide = wide.masked_fill(~allowed, torch.finfo(torch.float32).min)
        return wide.softmax(-1).to(scores.dtype)

    def attn_out(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... d"]:
        """What attention adds to the residual stream."""
        out = self.output(z.flatten(-2))
        return out if self.post_attn is None else self.post_attn(out)

    def mlp_hidden(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d_mlp"]:
        """``mlp_post``, from the residual stream that the MLP reads."""
        assert self.mlp is not None
        return self.mlp.hidden(self.norm2(x))

    def mlp_out(self, hidden: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d"]:
        """What the MLP adds to the residual stream."""
        assert self.mlp is not None
        out = self.mlp.down(hidden)
        return out if self.post_mlp is None else self.post_mlp(out)


@dataclass(frozen=True)
class Decoder:
    """A causal decoder as functions: embed, layers, readout."""

    embedding: Float[Tensor, "vocab d"]
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    unembedding: Float[Tensor, "vocab d"]
    unembedding_bias: Float[Tensor, " vocab"] | None = None
    position_embedding: Float[Tensor, "n_ctx d"] | None = None
    embedding_scale: float = 1.0
    softcap: float | None = None

    def embed(self, ids: Int[Tensor, "n w"], positions: Int[Tensor, "n w"]) -> Float[Tensor, "n w d"]:
        """The residual stream before the first layer."""
        x = F.embedding(ids, self.embedding)
        if self.embedding_scale != 1.0:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        return x if self.position_embedding is None else x + F.embedding(positions, self.position_embedding)

    def readout(
        self, resid: Float[Tensor, "... d"], tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "... token"]:
        """fp32 logits of the given tokens, or of the whole vocabulary."""
        x = self.final_norm(resid.to(self.unembedding.device)).float()
        weight = self.unembedding if tokens is None else self.unembedding[tokens]
        bias = self.unembedding_bias
        bias = bias if bias is None or tokens is None else bias[tokens]
        logits = F.linear(x, weight.float(), None if bias is None else bias.float())
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def causal_mask(queries: Int[Tensor, "b w"], keys: Int[Tensor, " j"], window: int | None) -> Bool[Tensor, "b w j"]:
    """Which key positions a query position may see: itself and before, at most ``window`` of them."""
    distance = queries[:, :, None] - keys[None, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
