"""Hooks: the same values, and the same effect of a write, on both backends and in every family."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mech_align.errors import UnknownSite, UnsupportedModel
from mech_align.models.bridge import to_bridge
from mech_align.models.hooked import quiet_construction, to_hooked
from mech_align.models.names import (
    attached,
    check_writable,
    from_layout,
    hook_name,
    hook_point,
    parts_of,
    shape_of,
    to_layout,
)
from mech_align.models.survey import backend_of, survey
from mech_align.sites import PARTS

IDS = torch.randint(3, tiny.VOCAB, (2, 10), generator=torch.Generator().manual_seed(2))
PARALLEL = ("gpt_neox", "phi", "gptj")
# Attention that stays in Hugging Face's code: the pattern comes out after use, rotated q and k do not come out.
DELEGATED = ("opt", "gptj", "gpt_neo")


def _pair(family: str, weights: str = "raw") -> tuple[Any, Any]:
    model = tiny.tiny_model(family)
    hooked = to_hooked(model, model.config, None, weights=weights)
    return hooked, to_bridge(model, model.config, None, weights=weights)


def _read(inner: Any, layer: int, part: str) -> Tensor:
    seen: list[Tensor] = []
    with torch.no_grad(), attached(inner, [(layer, part, lambda value: seen.append(value.clone()))]):
        inner(IDS)
    assert len(seen) == 1
    return seen[0]


def _written(inner: Any, layer: int, part: str, edit: Any) -> Tensor:
    with torch.no_grad(), attached(inner, [(layer, part, edit)]):
        return inner(IDS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_backends_agree_on_reads_and_writes(family: str) -> None:
    hooked, bridge = _pair(family)
    assert shape_of(hooked) == shape_of(bridge)
    absent = {"resid_mid"} if family in PARALLEL else set[str]()
    assert set(parts_of(hooked, 1)) == set(PARTS) - absent
    assert set(parts_of(bridge, 1)) == set(PARTS) - absent - ({"q", "k"} if family == "gptj" else set())
    with torch.no_grad():
        plain = hooked(IDS)
    for part in parts_of(bridge, 1):
        assert hook_name("hooked", hooked, 1, part) == hook_name("bridge", bridge, 1, part)
        value = _read(hooked, 1, part)
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(_read(bridge, 1, part), value, atol=1e-5 * size, rtol=0)
        if part == "pattern" and family in DELEGATED:
            continue
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(3)) - 0.5
        edited = _written(hooked, 1, part, lambda now, noise=noise: 0.5 * now + noise)
        assert (edited - plain).abs().max() > 1e-2, f"a write to {part} must show"
        changed = _written(bridge, 1, part, lambda now, noise=noise: 0.5 * now + noise)
        torch.testing.assert_close(changed, edited, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.MAIN_FAMILIES)
def test_layouts(family: str) -> None:
    hooked, bridge = _pair(family)
    s = shape_of(hooked)
    kv = {"gpt2": 4, "gpt_neox": 4, "gemma": 1}.get(family, 2)
    assert s.n_kv_heads == kv
    for inner in (hooked, bridge):
        assert _read(inner, 0, "z").shape == _read(inner, 0, "q").shape == (2, 10, s.n_heads, s.d_head)
        assert _read(inner, 0, "k").shape == _read(inner, 0, "v").shape == (2, 10, kv, s.d_head)
        assert _read(inner, 0, "pattern").shape == (2, s.n_heads, 10, 10)
        assert _read(inner, 0, "mlp_post").shape == (2, 10, s.d_mlp)
        assert _read(inner, 0, "mlp_out").shape == (2, 10, s.d_model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_q_and_k_are_what_enters_the_dot_product(family: str) -> None:
    for inner in _pair(family):
        q, k, pattern = (_read(inner, 1, part) for part in ("q", "k", "pattern"))
        scores = (
            torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) / q.shape[-1] ** 0.5
        )
        causal = torch.ones(10, 10, dtype=torch.bool).tril()
        torch.testing.assert_close(scores.masked_fill(~causal, -torch.inf).softmax(-1), pattern, atol=1e-5, rtol=1e-5)


def test_z_and_mlp_post_enter_the_output_projections() -> None:
    model = tiny.tiny_model("llama")
    layer: Any = model.model.layers[1]
    down, out = layer.mlp.down_proj.weight.clone(), layer.self_attn.o_proj.weight.clone()
    for inner in _pair("llama"):
        torch.testing.assert_close(
            _read(inner, 1, "mlp_post") @ down.T, _read(inner, 1, "mlp_out"), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            _read(inner, 1, "z").flatten(2) @ out.T, _read(inner, 1, "attn_out"), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt2", "gpt_neox"])
def test_the_stream_is_the_sum_of_its_parts(family: str) -> None:
    for inner in _pair(family):
        total = _read(inner, 1, "resid_pre") + _read(inner, 1, "attn_out") + _read(inner, 1, "mlp_out")
        torch.testing.assert_close(total, _read(inner, 1, "resid_post"), atol=1e-5, rtol=1e-5)
        assert 0 < survey(inner).residual_error < 1e-6


def test_writing_resid_mid_sees_every_other_edit_in_any_order() -> None:
    hooked, bridge = _pair("llama")
    edits = {
        "resid_mid": lambda value: 2 * value,
        "resid_pre": lambda value: value + 0.3,
        "attn_out": lambda value: 0.5 * value - 0.2,
    }
    results: list[Tensor] = []
    for inner in (hooked, bridge):
        for order in (list(edits), list(reversed(edits))):
            with torch.no_grad(), attached(inner, [(1, part, edits[part]) for part in order]):
                results.append(inner(IDS))
            with (
                torch.no_grad(),
                attached(inner, [(1, order[0], edits[order[0]])]),
                attached(inner, [(1, part, edits[part]) for part in order[1:]]),
            ):
                results.append(inner(IDS))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DELEGATED)
def test_a_pattern_that_cannot_be_written_is_refused(family: str) -> None:
    hooked, bridge = _pair(family)
    check_writable(hooked, "pattern")
    check_writable(bridge, "z")
    with pytest.raises(UnsupportedModel, match="read but not changed"):
        check_writable(bridge, "pattern")


def test_missing_parts_say_why() -> None:
    hooked, bridge = _pair("gptj")
    for inner in (hooked, bridge):
        with pytest.raises(UnknownSite, match=r"no resid_mid in layer 0(?s:.)*in parallel"):
            hook_point(inner, 0, "resid_mid")
    with pytest.raises(UnknownSite, match=r"never fires(?s:.)*backend='hooked'"):
        hook_name("bridge", bridge, 0, "q")
    with pytest.raises(UnknownSite, match="layers are 0 to 1"):
        hook_point(hooked, 2, "z")
    with pytest.raises(UnknownSite, match="no part 'zz'"):
        hook_point(hooked, 0, "zz")


def test_attention_only_models_have_no_mlp() -> None:
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "n_ctx": 2, "d_vocab": 11}
    with quiet_construction():
        inner = HookedTransformer(HookedTransformerConfig(**sizes, attn_only=True, seed=0, device="cpu"))
    assert parts_of(inner) == ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_post")
    assert shape_of(inner).d_mlp == 0
    with pytest.raises(UnknownSite, match="attention only"):
        hook_point(inner, 0, "mlp_out")


@pytest.mark.parametrize("index", [0, 1])
def test_only_own_hooks_are_removed(index: int) -> None:
    inner = _pair("llama")[index]
    point = hook_point(inner, 0, "z")
    mine: list[int] = []
    point.add_hook(lambda value, hook: mine.append(1))
    before = {name: len(other.fwd_hooks) for name, other in inner.hook_dict.items()}
    with (
        pytest.raises(ZeroDivisionError),
        attached(inner, [(0, "z", lambda value: value), (1, "resid_mid", lambda v: v)]),
    ):
        raise ZeroDivisionError
    with pytest.raises(UnknownSite), attached(inner, [(0, "z", lambda value: value), (9, "z", lambda value: value)]):
        pass
    assert {name: len(other.fwd_hooks) for name, other in inner.hook_dict.items()} == before
    with torch.no_grad():
        inner(IDS)
    assert mine == [1]


def test_a_copied_bridge_fires_its_own_rotary_hooks() -> None:
    bridge = _pair("gpt_neox")[1]
    twin = copy.deepcopy(bridge)
    seen: list[str] = []
    with torch.no_grad(), attached(bridge, [(0, "q", lambda value: seen.append("original"))]):
        twin(IDS)
    assert seen == []
    assert _read(twin, 0, "q").shape == (2, 10, 4, 8)


def test_flat_values_are_split_and_joined() -> None:
    s = shape_of(_pair("llama")[0])
    flat = torch.randn(2, 5, s.n_kv_heads * s.d_head)
    assert to_layout(flat, "k", s).shape == (2, 5, s.n_kv_heads, s.d_head)
    assert torch.equal(from_layout(to_layout(flat, "k", s), flat), flat)
    assert to_layout(flat, "resid_pre", s) is flat


def test_backend_of() -> None:
    assert [backend_of(inner) for inner in _pair("gpt2")] == ["hooked", "bridge"]
