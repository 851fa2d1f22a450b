"""The one wrapper that analyses talk to: a TransformerLens model of either backend, and its tokenizer."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mech_align.activations import Activations
from mech_align.errors import BadPrompts
from mech_align.models import capturing
from mech_align.models.decoder import Decoder
from mech_align.models.forward import Hook, Inner, forward, hooks_on
from mech_align.models.loading import Loaded
from mech_align.models.names import check_writable, hook_point, shape_of
from mech_align.models.tokens import Tokens
from mech_align.models.weights import read_decoder
from mech_align.sites import ModelShape, Site

Prompts = Sequence[str] | Sequence[Sequence[int]] | Tokens
Key = tuple[int, str]


class Model:
    """A model whose activations can be read and changed. Made by ``load_model`` or ``wrap_model``.

    Attributes:
        name: As the user gave it.
        backend: ``"hooked"`` (HookedTransformer) or ``"bridge"`` (TransformerBridge).
        inner: The TransformerLens object itself.
        tokenizer: A Hugging Face tokenizer, or ``None``: then prompts are token ids.
        shape: Numbers of layers, heads, neurons; the sizes.
        provenance: Source, weight processing, dtype, fingerprint: what a result must record.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.inner: Inner = loaded.inner
        self.backend = loaded.backend
        self.tokenizer: Any = loaded.tokenizer
        self.provenance: dict[str, Any] = dict(loaded.provenance)
        self.name = str(self.provenance.get("name") or self.provenance.get("source") or "model")
        self.shape: ModelShape = shape_of(loaded.inner)

    def __repr__(self) -> str:
        s = self.shape
        return f"Model({self.name!r}, {self.backend}, {s.n_layers} layers x {s.n_heads} heads, d_model {s.d_model})"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return torch.device(str(self.inner.cfg.device or "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.inner.parameters()).dtype

    @cached_property
    def decoder(self) -> Decoder | None:
        """The model as plain functions of its weights; ``None`` for architectures that these do not cover."""
        return read_decoder(self.inner)

    @cached_property
    def embedding_deviation(self) -> float:
        """Standard deviation of the token embeddings as they enter the stream; the unit of noise in causal tracing."""
        if self.decoder is not None:  # Gemma on the bridge scales them on the way
            return float(self.decoder.embedding.float().std()) * self.decoder.embedding_scale
        return float(self.inner.W_E.detach().float().std())

    def encode(self, prompts: Prompts) -> Tokens:
        """Token ids of prompts, right-padded; special tokens as the tokenizer adds them by default.

        Raises:
            BadPrompts: Text for a model without a tokenizer, an empty prompt, an unknown token id, or too many tokens.
        """
        if isinstance(prompts, Tokens):
            return prompts
        rows: list[list[int]] = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise BadPrompts("this model has no tokenizer, so that it cannot read text", hint="give token ids")
                rows.append(list(self.tokenizer(prompt)["input_ids"]))
            else:
                rows.append([int(token) for token in prompt])
        longest = max(map(len, rows), default=0)
        if longest > self.shape.n_ctx:
            raise BadPrompts(
                f"a prompt of {longest} tokens", why=f"{self.name} reads at most {self.shape.n_ctx}", hint="shorten it"
            )
        unknown = [token for row in rows for token in row if not 0 <= token < self.inner.cfg.d_vocab]
        if unknown:
            raise BadPrompts(
                f"token id {unknown[0]} is not in the vocabulary", why=f"it has {self.inner.cfg.d_vocab} tokens"
            )
        return Tokens.from_lists(rows, self.device)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """How each token reads; the id itself where there is no tokenizer."""
        if self.tokenizer is None:
            return [str(int(token)) for token in ids]
        return [str(self.tokenizer.convert_ids_to_tokens(int(token))) for token in ids]

    def logits(
        self, prompts: Prompts, *, positions: Literal["last", "all"] = "last", batch_size: int = 32
    ) -> Float[Tensor, "..."]:
        """Next-token logits in fp32: ``[prompt, vocab]`` at the last token, or ``[prompt, position, vocab]``.

        With ``"all"``, what lies behind the end of a shorter prompt is NaN.
        """
        tokens = self.encode(prompts)
        parts: list[Tensor] = []
        for rows in torch.arange(len(tokens)).split(batch_size):
            batch = _cut(tokens, rows)
            out = self.run(batch, want=positions)
            assert out is not None
            if positions == "all":
                out = out.masked_fill(~batch.mask[..., None].to(out.device), torch.nan)
                gap = tokens.ids.shape[1] - out.shape[1]
                out = torch.nn.functional.pad(out, (0, 0, 0, gap), value=torch.nan)
            parts.append(out)
        return torch.cat(parts)

    def run(
        self,
        tokens: Tokens,
        hooks: Sequence[Hook] = (),
        *,
        want: Literal["last", "all", "none"] = "last",
        n_layers: int | None = None,
        grad: bool = False,
    ) -> Tensor | None:
        """One forward pass with functions on its sites; the logits that are wanted, in fp32."""
        with torch.set_grad_enabled(grad), hooks_on(self.inner, hooks):
            return forward(self.inner, tokens, want, n_layers)

    def editing(self, hooks: Sequence[Hook]) -> hooks_on:
        """Context in which every forward pass runs with the hooks. One that never fires is an error on leaving."""
        for hook in hooks:
            check_writable(self.inner, hook.part, hook.layer)
        return hooks_on(self.inner, hooks)

    def capture(self, tokens: Tokens, wanted: Collection[Key]) -> dict[Key, Tensor]:
        """Whole activations of one batch ``[b, position, ...]``, in memory. Behind a prompt's end they mean nothing."""
        for layer, part in wanted:
            hook_point(self.inner, layer, part)
        return capturing.capture(self, tokens, wanted)

    def activations(
        self,
        prompts: Prompts,
        sites: Iterable[Site | str],
        *,
        positions: str | int | Sequence[int] = "last",
        batch_size: int | None = None,
        store: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Activations:
        """Activations of many prompts, keeping nothing but the sites and positions asked for.

        Args:
            sites: Addresses such as ``"L3.resid_post"``, or parts such as ``"resid_post"`` for all layers.
            positions: ``"last"``, ``"mean"`` (over real tokens), ``"all"`` (one row a token), one position for all
                prompts (negative counts from the end), or one position for each prompt.
            store: A folder to stream into; the same call goes on where it stopped. Without one, values that would not
                fit into memory go to a temporary folder.
        """
        return capturing.stream(
            self,
            self.encode(prompts),
            sites,
            positions=positions,
            batch_size=batch_size,
            store=store,
            progress=progress,
        )

    def gradients(
        self,
        tokens: Tokens,
        wanted: Collection[Key],
        objective: Callable[[Float[Tensor, "b vocab"]], Float[Tensor, " b"]],
        *,
        hooks: Sequence[Hook] = (),
    ) -> tuple[Mapping[Key, Tensor], Mapping[Key, Tensor], Float[Tensor, " b"]]:
        """Values and gradients of a per-prompt score with respect to activations: ``(values, gradients, scores)``.

        Prompts do not mix, so the gradient of the summed score is each prompt's own.
        """
        return capturing.gradients(self, tokens, wanted, objective, hooks)

    def generate(
        self, prompts: Prompts, *, max_new_tokens: int = 20, hooks: Sequence[Hook] = (), batch_size: int = 32
    ) -> list[list[int]]:
        """Greedy continuations as token ids, up to an end-of-sequence token; the hooks are active at every step."""
        tokens = self.encode(prompts)
        rows = [ids[:n].tolist() for ids, n in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]
        stop = getattr(self.tokenizer, "eos_token_id", None)
        out: list[list[int]] = [[] for _ in rows]
        for first in range(0, len(rows), batch_size):
            alive = list(range(first, min(first + batch_size, len(rows))))
            for _ in range(max_new_tokens):
                alive = [i for i in alive if len(rows[i]) + len(out[i]) < self.shape.n_ctx]
                if not alive:
                    break
                logits = self.run(Tokens.from_lists([rows[i] + out[i] for i in alive], self.device), hooks)
                assert logits is not None
                for i, token in zip(list(alive), logits.argmax(-1).tolist(), strict=True):
                    if token == stop:
                        alive.remove(i)
                    else:
                        out[i].append(token)
        return out


def _cut(tokens: Tokens, rows: Tensor) -> Tokens:
    lengths = tokens.lengths[rows.to(tokens.lengths.device)]
    return Tokens(tokens.ids[rows.to(tokens.ids.device), : int(lengths.max())], lengths)
