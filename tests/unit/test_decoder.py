"""The functional decoder against PyTorch and Hugging Face, piece by piece."""

import pytest
import torch
import torch.nn.functional as F
from contract.subjects import hooked, pairs, subject

from mech_align.models import Tokens, wrap_model
from mech_align.models.decoder import Norm, Rotary, causal_mask
from mech_align.sweeps.suffix import undisturbed


def test_norms() -> None:
    x, w, b = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    assert torch.allclose(Norm("layer", w, b, 1e-3)(x), F.layer_norm(x, (8,), w, b, 1e-3), atol=1e-6)
    assert torch.allclose(Norm("rms", w, None, 1e-3, 1.0)(x), F.rms_norm(x, (8,), w + 1, 1e-3), atol=1e-6)
    assert torch.equal(Norm("none")(x), x)
    for kind, centred in (("layer", x - x.mean(-1, keepdim=True)), ("rms", x)):
        assert torch.allclose(centred / Norm(kind).scale(x), Norm(kind)(x), atol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance() -> None:
    angle = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.1]))
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    for turn in (Rotary(cos, sin), Rotary(cos[:, [0, 2, 1, 3]], sin[:, [0, 2, 1, 3]], adjacent=True)):
        q, k = torch.randn(1, 1, 1, 6), torch.randn(1, 1, 1, 6)
        at = [turn(x, torch.tensor([[p]])) for x in (q, k) for p in (0, 3, 10, 13)]
        assert torch.allclose((at[1] * at[4]).sum(), (at[3] * at[6]).sum(), atol=1e-5)
        assert torch.allclose(at[2].norm(), q.norm()) and torch.equal(at[0], q)
        assert torch.equal(at[2][..., 4:], q[..., 4:]), "what lies beyond the rotated part stays"


@pytest.mark.parametrize("window", [None, 1, 3])
def test_masks(window: int | None) -> None:
    mask = causal_mask(torch.tensor([[2, 5]]), torch.arange(7), window)[0]
    for row, query in zip(mask, (2, 5), strict=True):
        wanted = [key for key in range(7) if key <= query and (window is None or query - key < window)]
        assert row.nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", "gpt_neox", "gemma2", "gemma3", "phi3"])
def test_the_undisturbed_run_is_the_models(family: str) -> None:
    for backend in ("hooked", "bridge"):
        model = subject(family, backend)
        tokens = Tokens.from_lists(pairs().clean)
        decoder = model.decoder
        assert decoder is not None
        kept = undisturbed(decoder, tokens.ids, keep=lambda layer, part: True)
        real = model.capture(tokens, [key for key in kept if key[1] != "resid_mid" or family != "gpt_neox"])
        for key, value in real.items():
            for row, n in enumerate(tokens.lengths.tolist()):
                a, b = ((v[row, :, :n, :n] if key[1] == "pattern" else v[row, :n]) for v in (value, kept[key]))
                assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max())), key
        resid = kept[model.shape.n_layers - 1, "resid_post"][torch.arange(len(tokens)), tokens.last]
        logits = decoder.readout(resid)
        assert torch.allclose(logits, model.logits(tokens), atol=2e-5 * max(1.0, float(logits.abs().max())))
        assert torch.equal(decoder.readout(resid, torch.tensor([5, 2])), logits[:, [5, 2]]) or torch.allclose(
            decoder.readout(resid, torch.tensor([5, 2])), logits[:, [5, 2]], atol=1e-5
        )


@pytest.mark.parametrize(
    "plan",
    [{"positional_embedding_type": "shortformer"}, {"positional_embedding_type": "alibi"}, {"act_fn": "solu_ln"}],
)
def test_what_it_does_not_know_is_left_to_full_passes(plan: dict[str, str]) -> None:
    assert wrap_model(hooked(**plan)).decoder is None
