from typing import Any

import pytest
import torch
from contract.subjects import EVERYONE, fresh, pairs, subject
from tiny import VOCAB, tiny_tokenizer

from mech_align.errors import BadPrompts, PatchDidNotFire, UnknownSite
from mech_align.metrics import logit_difference
from mech_align.models import Hook, Tokens, wrap_model

ROWS = [list(row) for row in pairs().clean]


def count(model: Any) -> int:
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in set(model.inner.hook_dict.values()))


def test_encoding() -> None:
    model = subject("gpt2", "hooked")
    tokens = model.encode(["Lily went", "the park ."])
    assert tokens.ids.tolist() == [[1, 8, 12, 0], [1, 4, 14, 15]] and tokens.lengths.tolist() == [3, 4]
    assert tokens.last.tolist() == [2, 3] and tokens.mask.sum().item() == 7
    assert model.encode(tokens) is tokens
    assert model.encode("Lily").ids.tolist() == [[1, 8]]
    assert model.token_strings([8, 15]) == ["Lily", "."]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[5, VOCAB]], "not in the vocabulary"),
        ([[5, -1]], "not in the vocabulary"),
        ([[1] * 65], "65 tokens"),
        ([[1], []], "token"),
    ],
)
def test_prompts_that_cannot_be_read(prompts: Any, says: str) -> None:
    with pytest.raises(BadPrompts, match=says):
        subject("gpt2", "hooked").encode(prompts)


def test_text_needs_a_tokenizer() -> None:
    bare = subject("attn_only", "hooked")
    with pytest.raises(BadPrompts, match="no tokenizer"):
        bare.encode(["Lily"])
    assert bare.token_strings([3]) == ["3"]
    assert wrap_model(bare.inner, tiny_tokenizer(), "mine").encode(["Lily"]).ids.tolist() == [[1, 8]]


@pytest.mark.parametrize(("family", "backend"), EVERYONE)
def test_logits_last_all_and_batches(family: str, backend: str) -> None:
    model = subject(family, backend)
    every = model.logits(ROWS, positions="all", batch_size=3)
    last = model.logits(ROWS, batch_size=2)
    assert every.dtype == last.dtype == torch.float32
    for i, row in enumerate(ROWS):
        assert torch.allclose(every[i, len(row) - 1], last[i], atol=1e-4)
        assert bool(every[i, len(row) :].isnan().all()) and bool(every[i, : len(row)].isfinite().all())
        assert torch.allclose(model.logits([row])[0], last[i], atol=1e-4)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_edit_that_never_ran_is_an_error(backend: str) -> None:
    model = fresh("gpt2", backend)
    before = count(model)
    with (
        pytest.raises(PatchDidNotFire, match="resid_post of layer 1"),
        model.editing([Hook(1, "resid_post", lambda v: v)]),
    ):
        pass
    with model.editing([Hook(1, "resid_post", lambda value: value * 0)]) as hooks:
        changed = model.logits(ROWS)
    assert hooks[0].fired > 0 and not torch.allclose(changed, model.logits(ROWS))
    with pytest.raises(ZeroDivisionError), model.editing([Hook(1, "z", lambda value: value)]):
        raise ZeroDivisionError
    assert count(model) == before
    with pytest.raises(UnknownSite) as caught, model.editing([Hook(3, "z", lambda value: value)]):
        model.logits(ROWS)
    assert "layers are 0 to 2" in str(caught.value)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_hooks_are_removed_after_an_error_inside_the_pass_and_the_users_stay(backend: str) -> None:
    model = fresh("gpt2", backend)
    seen: list[str] = []
    point = model.inner.hook_dict["blocks.1.attn.hook_z"]
    point.add_hook(lambda value, hook: seen.append("user"))
    before = count(model)

    def boom(value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    for layer, part in ((1, "z"), (0, "resid_mid"), (2, "mlp_out")):
        with pytest.raises(ZeroDivisionError):
            model.run(Tokens.from_lists(ROWS), [Hook(0, "resid_pre", lambda value: value), Hook(layer, part, boom)])
        assert count(model) == before
    seen.clear()
    model.capture(Tokens.from_lists(ROWS), {(1, "z"), (2, "resid_mid")})
    assert seen == ["user"] and count(model) == before


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "hooked"), ("llama", "bridge"), ("gpt_neox", "hooked")])
def test_gradients_are_those_of_finite_differences(family: str, backend: str) -> None:
    model = subject(family, backend, dtype="float64")
    tokens = Tokens.from_lists(ROWS)
    keys = [(0, "resid_pre"), (1, "z"), (1, "mlp_post"), (2, "attn_out"), (1, "v")]

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 5] - logits[:, 7]

    values, grads, scores = model.gradients(tokens, keys, objective)
    assert torch.allclose(scores, objective(model.logits(tokens)), atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    for key in keys:
        step = torch.randn(values[key].shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            out = model.run(tokens, [Hook(*key, lambda value, s=sign, d=step: value + s * 1e-3 * d)])
            assert out is not None
            ends.append(objective(out))
        slope = (ends[0] - ends[1]) / 2e-3
        wanted = (grads[key] * step).flatten(1).sum(1)
        assert torch.allclose(slope.double(), wanted.double(), rtol=2e-2, atol=2e-2), key
    assert count(model) == 0 and logit_difference().linear


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_generation_is_greedy_batched_and_edited(backend: str) -> None:
    model = subject("llama", backend)
    found = model.generate(ROWS, max_new_tokens=4, batch_size=3)
    for row, new in zip(ROWS, found, strict=True):
        grown = list(row)
        for token in new:
            assert int(model.logits([grown])[0].argmax()) == token
            grown.append(token)
        assert len(new) == 4 or int(model.logits([grown])[0].argmax()) == 2
    edited = model.generate(ROWS, max_new_tokens=4, hooks=[Hook(2, "resid_post", lambda value: -value)])
    assert edited != found


def test_a_wrapped_model_is_left_as_it_is() -> None:
    inner = fresh("gpt2", "hooked").inner
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    model = wrap_model(inner)
    model.logits(ROWS)
    assert model.inner is inner and model.backend == "hooked" and "gpt2" not in repr(type(model))
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
    assert (model.shape.n_layers, model.shape.n_heads, model.dtype) == (3, 4, torch.float32)
