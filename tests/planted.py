"""A HookedTransformer written by hand: one head copies, one neuron reads it, everything else is zero.

Vocabulary 0..11, one dimension of the stream a token, then one a position. Head 2 of layer 1 looks at position 1, and
writes the token that stands there to where the answer is read. No norm, no positions in the value: exact arithmetic.
"""

import warnings
from typing import Any

import torch

N_LAYERS, N_HEADS, VOCAB, N_CTX = 3, 4, 12, 6
LAYER, HEAD, NEURON = 1, 2, 5
CLEAN, CORRUPT, SUBJECT = [0, 3, 1, 2], [0, 4, 1, 2], 1


def planted(*, by_neuron: bool = False) -> Any:
    """With ``by_neuron``, head 0 of layer 0 moves token 3 and neuron 5 of layer 1 turns it into the answer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    d_model = VOCAB + N_CTX + 1
    plan = HookedTransformerConfig(
        n_layers=N_LAYERS, n_heads=N_HEADS, d_model=d_model, d_head=VOCAB, d_mlp=8, n_ctx=N_CTX, d_vocab=VOCAB,
        act_fn="relu", normalization_type=None, device="cpu",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
        model = HookedTransformer(plan)
    state = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    tokens, places = torch.arange(VOCAB), torch.arange(N_CTX)
    state["embed.W_E"][tokens, tokens] = 1.0
    state["pos_embed.W_pos"][places, VOCAB + places] = 1.0
    layer, head = (0, 0) if by_neuron else (LAYER, HEAD)
    at = f"blocks.{layer}.attn"
    # The query asks for position 1 so loudly that no other weight is left in fp32.
    state[f"{at}.W_Q"][head, VOCAB + 2 : VOCAB + N_CTX, 0] = 1.0
    state[f"{at}.W_K"][head, VOCAB + SUBJECT, 0] = 1e4
    state[f"{at}.W_V"][head, tokens, tokens] = 1.0
    if by_neuron:
        state[f"{at}.W_O"][head, 3, -1] = 1.0  # what is written into the last dimension only the neuron reads
        state[f"blocks.{LAYER}.mlp.W_in"][-1, NEURON] = 1.0
        state[f"blocks.{LAYER}.mlp.W_out"][NEURON, 3] = 1.0
    else:
        state[f"{at}.W_O"][head, tokens, tokens] = 1.0
    state["unembed.W_U"][tokens, tokens] = 1.0
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(state[name])
    return model.requires_grad_(False).eval()
