"""Loading: the same logits as Hugging Face on both backends, adapters proved, and errors that say what to do."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

import mech_align.models.hooked as hooked_module
from mech_align.errors import AdapterUnchanged, ModelNotFound, OutOfMemory, SelfCheckFailed, UnsupportedModel
from mech_align.models.adapters import apply_adapter
from mech_align.models.bridge import to_bridge
from mech_align.models.fingerprint import fingerprint, tensor_digest
from mech_align.models.hooked import activation_name, quiet_construction, to_hooked
from mech_align.models.loading import load_backend, wrap_backend
from mech_align.models.sources import translate

IDS = torch.randint(3, tiny.VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


def _both(family: str, weights: str = "raw", **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = tiny.tiny_model(family, **changes)
    reference = _logits(model)
    hooked = _logits(to_hooked(model, model.config, None, weights=weights))
    return reference, hooked, _logits(to_bridge(model, model.config, None, weights=weights))


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_both_backends_give_hugging_faces_logits(family: str) -> None:
    reference, hooked, bridge = _both(family)
    assert reference.std() > 0.5, "a flat model could not show an error"
    torch.testing.assert_close(hooked, reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(bridge, reference, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*does not support fold_ln")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "phi3", "olmo2"])
def test_folded_weights_keep_the_log_probabilities(family: str) -> None:
    reference, hooked, bridge = (values.log_softmax(-1) for values in _both(family, "folded"))
    torch.testing.assert_close(hooked, reference, atol=2e-4, rtol=0)
    torch.testing.assert_close(bridge, reference, atol=2e-4, rtol=0)


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("gpt2", {"activation_function": "gelu"}),
    "inner": ("gpt2", {"n_inner": 40}),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "eps": ("llama", {"rms_norm_eps": 0.5}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "no grouping": ("llama", {"num_key_value_heads": 4}),
    "attention biases": ("llama", {"attention_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
    "linear": ("llama", _rope("linear", factor=3.0)),
    "llama3": ("llama", _rope("llama3", **LLAMA3)),
    "yarn": ("qwen2", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "partial": ("phi3", _rope("default", partial_rotary_factor=0.5)),
    "some windows": ("qwen2", {"use_sliding_window": True, **WINDOWS}),
    "no window": ("mistral", {"sliding_window": None}),
    "gemma with relu": ("gemma", {"hidden_act": "relu"}),
    "uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "neo-x with gelu_new": ("gpt_neox", {"hidden_act": "gelu_new"}),
    "clipped": ("olmo", {"clip_qkv": 0.5}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_configuration_switches_on_is_converted(variant: str) -> None:
    family, changes = VARIANTS[variant]
    reference, hooked, bridge = _both(family, **changes)
    plain = _logits(tiny.tiny_model(family))
    assert (plain - reference).abs().max() > 5e-4, "the setting makes no difference, so that the test shows nothing"
    torch.testing.assert_close(hooked, reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(bridge, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"mlp_bias": True}, "biases inside"),
        ("phi", {"qk_layernorm": True}, "normalised queries"),
        ("opt", {"do_layer_norm_before": False}, "norms after"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}, "dynamic"),
        ("gpt2", {"activation_function": "mish"}, "activation"),
    ],
)
def test_what_has_no_counterpart_is_refused(family: str, changes: dict[str, Any], word: str) -> None:
    model = tiny.tiny_model(family, **changes)
    with pytest.raises(UnsupportedModel, match=word):
        to_hooked(model, model.config, None)


@pytest.mark.parametrize(("name", "want"), [("gelu", "gelu"), ("gelu_new", "gelu_pytorch_tanh"), ("relu", "relu")])
def test_the_activation_is_found_by_its_values(name: str, want: str) -> None:
    assert activation_name(tiny.tiny_model("gpt2", activation_function=name)) == want


# ---------------------------------------------------------------- load_backend


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", tiny.MAIN_FAMILIES)
def test_a_local_folder_loads_on_either_backend(family: str, backend: str, tmp_path: Path) -> None:
    # The name of the folder must not matter: TransformerLens' own loader reads architectures out of it.
    folder = tiny.save_tiny(family, tmp_path / "my-robert-t5-gemma-llama")
    loaded = load_backend(folder, backend=backend, device="cpu")
    torch.testing.assert_close(_logits(loaded.inner), _logits(tiny.tiny_model(family)), atol=1e-4, rtol=0)
    assert loaded.backend == backend == loaded.provenance["backend"]
    assert loaded.checks["logits"] < 1e-4
    assert loaded.provenance["dtype"] == "float32"
    assert loaded.provenance["weights"] == "raw" and not any(loaded.provenance["weight_processing"].values())
    json.dumps(loaded.provenance)
    assert not any(parameter.requires_grad for parameter in loaded.inner.parameters())
    assert not loaded.inner.training


def test_loading_prints_and_warns_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tiny("gpt2", tmp_path / "m")
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backend(folder, device="cpu")
        load_backend(folder, backend="bridge", device="cpu", weights="folded")
    assert capfd.readouterr() == ("", "")


def test_only_the_deprecation_of_hooked_transformer_is_silenced() -> None:
    with pytest.warns(DeprecationWarning, match="another"), quiet_construction():
        warnings.warn("another", DeprecationWarning, stacklevel=1)


def test_the_fingerprint_names_the_weights_and_not_the_backend(tmp_path: Path) -> None:
    one, other = tiny.save_tiny("llama", tmp_path / "a"), tiny.save_tiny("llama", tmp_path / "b", seed=1)
    prints = [
        load_backend(one, backend=backend, device="cpu").provenance["fingerprint"] for backend in ("hooked", "bridge")
    ]
    assert prints[0] == prints[1]
    assert load_backend(other, device="cpu").provenance["fingerprint"] != prints[0]


def test_one_changed_number_changes_the_digest() -> None:
    value = torch.randn(300, 70)
    changed = value.clone()
    changed[171, 33] = torch.nextafter(changed[171, 33], torch.tensor(9.0))
    assert tensor_digest(value) != tensor_digest(changed)
    assert tensor_digest(value) == tensor_digest(value.clone())
    assert tensor_digest(value) != tensor_digest(value.T)
    assert tensor_digest(torch.tensor([0.0])) == tensor_digest(torch.tensor([-0.0]))
    assert fingerprint([("a", value)]) != fingerprint([("b", value)])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_bfloat16(backend: str, tmp_path: Path) -> None:
    loaded = load_backend(tiny.save_tiny("llama", tmp_path / "m"), backend=backend, dtype="bf16", device="cpu")
    assert next(loaded.inner.parameters()).dtype == torch.bfloat16
    assert loaded.provenance["dtype"] == "bfloat16"


def test_a_device_map_goes_to_the_bridge(tmp_path: Path) -> None:
    folder = tiny.save_tiny("llama", tmp_path / "m")
    loaded = load_backend(folder, device_map={"": "cpu"})
    assert loaded.backend == "bridge"
    torch.testing.assert_close(_logits(loaded.inner), _logits(tiny.tiny_model("llama")), atol=1e-4, rtol=0)
    with pytest.raises(UnsupportedModel, match="device_map does not work with HookedTransformer"):
        load_backend(folder, backend="hooked", device_map="auto")
    with pytest.raises(UnsupportedModel, match="exclude each other"):
        load_backend(folder, device="cpu", device_map="auto")


def test_auto_takes_the_bridge_for_what_does_not_convert(tmp_path: Path) -> None:
    folder = tiny.save_tiny("llama", tmp_path / "m", mlp_bias=True)
    loaded = load_backend(folder, device="cpu")
    assert loaded.backend == "bridge"
    assert "biases inside a gated MLP" in loaded.provenance["warnings"][0]
    assert loaded.checks["logits"] < 1e-4
    with pytest.raises(UnsupportedModel, match="biases inside a gated MLP"):
        load_backend(folder, backend="hooked", device="cpu")


def test_a_wrong_conversion_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, settings_of = hooked_module.FAMILIES["LlamaForCausalLM"]
    wrong = {
        **hooked_module.FAMILIES,
        "LlamaForCausalLM": (family, lambda c: {**settings_of(c), "rotary_base": 5100.0}),
    }
    monkeypatch.setattr(hooked_module, "FAMILIES", wrong)
    folder = tiny.save_tiny("llama", tmp_path / "m")
    with pytest.raises(SelfCheckFailed, match="does not give Hugging Face's logits"):
        load_backend(folder, backend="hooked", device="cpu")
    loaded = load_backend(folder, device="cpu")
    assert loaded.backend == "bridge"
    assert "does not give Hugging Face's logits" in loaded.provenance["warnings"][0]


def test_where_the_bridge_is_wrong_it_is_not_used(tmp_path: Path) -> None:
    # TransformerLens' GPT-2 bridge divides the scores by sqrt(d_head) whatever the configuration says.
    folder = tiny.save_tiny("gpt2", tmp_path / "m", scale_attn_weights=False)
    with pytest.raises(SelfCheckFailed, match="backend='hooked'"):
        load_backend(folder, backend="bridge", device="cpu")
    assert load_backend(folder, device="cpu").backend == "hooked"


@pytest.mark.data
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["stories260K-hf", "slm4096-hf"])
def test_real_weights(data_dir: Path, name: str, backend: str) -> None:
    loaded = load_backend(data_dir / name, backend=backend, device="cpu")
    assert loaded.checks["logits"] < 1e-4
    assert loaded.tokenizer is not None


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("bos", [True, False])
def test_the_users_tokenizer_keeps_its_ways(backend: str, bos: bool, tmp_path: Path) -> None:
    folder = tiny.save_tiny("llama", tmp_path / "m", tokenizer=False)
    tiny.tiny_tokenizer(bos=bos, padding_side="left").save_pretrained(folder)
    loaded = load_backend(folder, backend=backend, device="cpu")
    plain = AutoTokenizer.from_pretrained(folder)
    text = "Lily went to the park ."
    assert loaded.tokenizer is not None
    assert loaded.tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.inner.to_tokens(text)[0].tolist() == plain(text)["input_ids"]
    assert loaded.inner.to_tokens(["She went", "He"])[1].tolist()[-1] == 0, "the inner copy pads on the right"


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    loaded = load_backend(tiny.save_tiny("gpt2", tmp_path / "m", tokenizer=False), device="cpu")
    assert loaded.tokenizer is None
    assert "token ids" in loaded.provenance["warnings"][0]


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_an_adapter_is_merged_on_both_backends(family: str, backend: str, tmp_path: Path) -> None:
    from peft import PeftModel

    folder, adapter = tiny.save_tiny(family, tmp_path / "m"), tiny.write_adapter(tmp_path / "a", family)
    want = _logits(PeftModel.from_pretrained(tiny.tiny_model(family), str(adapter)).eval())
    loaded = load_backend(folder, adapter=adapter, backend=backend, device="cpu")
    torch.testing.assert_close(_logits(loaded.inner), want, atol=1e-4, rtol=0)
    assert (want - _logits(tiny.tiny_model(family))).abs().max() > 0.5
    record = loaded.provenance["adapter"]
    assert record["kind"] == "LORA" and record["n_changed"] >= 3 and set(record["relative_change"]) == {"0", "1", "2"}
    base = load_backend(folder, backend=backend, device="cpu")
    assert base.provenance["fingerprint"] != loaded.provenance["fingerprint"]


def test_rank_stabilised_scaling_is_respected(tmp_path: Path) -> None:
    _, plain = apply_adapter(tiny.tiny_model("llama"), tiny.write_adapter(tmp_path / "a", "llama"))
    _, stable = apply_adapter(tiny.tiny_model("llama"), tiny.write_adapter(tmp_path / "b", "llama", rslora=True))
    for layer, change in plain.relative_change.items():  # alpha / sqrt(4) is twice alpha / 4
        assert stable.relative_change[layer] == pytest.approx(2 * change, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_embeddings_leaves_the_other(target: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    wrapped = get_peft_model(
        tiny.tiny_model("llama", tie_word_embeddings=True),
        LoraConfig(r=2, target_modules=[target], init_lora_weights=False),
    )
    wrapped.save_pretrained(str(tmp_path))
    base = tiny.tiny_model("llama", tie_word_embeddings=True)
    want = _logits(PeftModel.from_pretrained(base, str(tmp_path)).eval())
    merged, _ = apply_adapter(tiny.tiny_model("llama", tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(_logits(merged), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(_logits(to_hooked(merged, merged.config, None)), want, atol=1e-4, rtol=0)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] = -0.0  # adding 0 flips the sign bit and no more
    with pytest.raises(AdapterUnchanged, match="changes no weight"):
        apply_adapter(model, tiny.write_adapter(tmp_path / "a", "llama", zero=True))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "a", "llama")
    with pytest.raises(AdapterUnchanged, match="none of its target modules"):
        apply_adapter(tiny.tiny_model("gpt2"), adapter)
    with pytest.raises(AdapterUnchanged, match="4 tensors of the adapter .* have no place"):
        apply_adapter(tiny.tiny_model("llama", num_hidden_layers=2), adapter)
    with pytest.raises(UnsupportedModel, match="other sizes"):
        apply_adapter(tiny.tiny_model("llama", hidden_size=64), adapter)


def test_adapter_keys_that_match_nothing_are_noticed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tiny.write_adapter(tmp_path / "a", "llama")
    path = adapter / "adapter_model.safetensors"
    save_file({key.replace("self_attn", "attention"): value for key, value in load_file(path).items()}, path)
    with pytest.raises(AdapterUnchanged, match="have no place in this model"):
        apply_adapter(tiny.tiny_model("llama"), adapter)


def test_an_adapter_with_more_tokens_is_explained(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = tiny.write_adapter(tmp_path / "a", "llama")
    path = adapter / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.randn(tiny.VOCAB + 3, 32)}
    save_file({**load_file(path), **more}, path)
    with pytest.raises(UnsupportedModel, match=f"vocabulary of {tiny.VOCAB + 3} tokens, the model has {tiny.VOCAB}"):
        apply_adapter(tiny.tiny_model("llama"), adapter)


def test_missing_adapters_are_explained(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama")
    good = tiny.write_adapter(tmp_path / "good", "llama")
    with pytest.raises(ModelNotFound, match=f"no adapter folder .*(?s:.)*{good.name}"):
        apply_adapter(model, tmp_path / "goood")
    with pytest.raises(ModelNotFound, match="adapter_config.json is missing"):
        apply_adapter(model, tiny.save_tiny("llama", tmp_path / "whole"))
    with pytest.raises(ModelNotFound, match="is a file"):
        apply_adapter(model, good / "adapter_config.json")
    (good / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelNotFound, match="damaged"):
        apply_adapter(model, good)
    (good / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="has no weights"):
        apply_adapter(model, good)
    with pytest.raises(ModelNotFound, match="neither as a folder nor on the hub"):
        apply_adapter(model, "nobody/nothing")


# ---------------------------------------------------------------- errors


def _broken(tmp_path: Path, **config: Any) -> Path:
    folder = tiny.save_tiny("llama", tmp_path / "m")
    if config:
        tiny.edit_json(folder / "config.json", **config)
    return folder


def test_places_without_a_model_are_explained(tmp_path: Path) -> None:
    folder = _broken(tmp_path)
    with pytest.raises(ModelNotFound, match="is a file"):
        load_backend(folder / "config.json")
    with pytest.raises(ModelNotFound, match=r"no folder(?s:.)*did you mean .*/m\?"):
        load_backend(str(tmp_path / "mm"))
    with pytest.raises(
        ModelNotFound, match=r"missing: config.json, model.safetensors, tokenizer.json(?s:.)*inside it: .*/m"
    ):
        load_backend(tmp_path)
    with pytest.raises(ModelNotFound, match="this is an adapter"):
        load_backend(tiny.write_adapter(tmp_path / "a", "llama"))
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        load_backend("nobody/nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        load_backend(folder)


def test_damaged_folders_are_explained(tmp_path: Path) -> None:
    folder = _broken(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:9000])
    with pytest.raises(ModelNotFound, match="damaged or incomplete"):
        load_backend(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(whole)
    # Hugging Face fills these with random numbers and says so in a log line only.
    tiny.edit_json(folder / "config.json", num_hidden_layers=4)
    with pytest.raises(ModelNotFound, match="lack 9 tensors"):
        load_backend(folder, device="cpu")
    tiny.edit_json(folder / "config.json", num_hidden_layers=3, vocab_size=200)
    with pytest.raises(ModelNotFound, match="do not fit its config.json"):
        load_backend(folder, device="cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        load_backend(folder, device="cpu")


def test_models_that_are_not_covered_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="does not know the architecture"):
        load_backend(_broken(tmp_path / "a", model_type="foo", architectures=["Foo"]), device="cpu")
    code = {"AutoConfig": "conf.Foo", "AutoModelForCausalLM": "conf.FooModel"}
    with pytest.raises(UnsupportedModel, match="its own Python code"):
        load_backend(_broken(tmp_path / "b", model_type="foo", auto_map=code), device="cpu")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"backend": "nnsight"}, "no backend"),
        ({"weights": "centred"}, "no weight processing"),
        ({"dtype": "int3"}, "no number format"),
        ({"device": "toaster"}, "no device"),
    ],
)
def test_unknown_arguments_are_explained(arguments: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        load_backend(_broken(tmp_path), **arguments)


def test_errors_of_the_hub_are_translated() -> None:
    class GatedRepoError(OSError):
        pass

    gated = translate(GatedRepoError("403 Client Error. Access to model x/y is restricted"), "x/y", is_folder=False)
    assert isinstance(gated, ModelNotFound) and "gated" in str(gated) and "huggingface.co/x/y" in str(gated)
    memory = translate(RuntimeError("CUDA out of memory. Tried to allocate"), "x/y", is_folder=False)
    assert isinstance(memory, OutOfMemory) and "bfloat16" in str(memory)
    unknown = RuntimeError("something else")
    assert translate(unknown, "x/y", is_folder=False) is unknown


# ---------------------------------------------------------------- wrapping


def test_wrapping_leaves_the_model_as_it_is() -> None:
    model = tiny.tiny_model("llama")
    inner = to_hooked(model, model.config, tiny.tiny_tokenizer())
    loaded = wrap_backend(inner, name="mine")
    assert loaded.inner is inner and loaded.backend == "hooked" and loaded.tokenizer is inner.tokenizer
    assert loaded.provenance["name"] == "mine" and loaded.provenance["weights"] == "raw"
    own = tiny.tiny_tokenizer()
    assert wrap_backend(inner, tokenizer=own).tokenizer is own


def test_wrapping_a_bridge_knows_its_processing() -> None:
    model = tiny.tiny_model("gpt2")
    bridge = to_bridge(model, model.config, None, weights="folded")
    loaded = wrap_backend(bridge)
    assert loaded.backend == "bridge" and loaded.provenance["weights"] == "folded" and loaded.tokenizer is None


def test_wrapping_an_attention_only_model() -> None:
    with quiet_construction():
        inner = HookedTransformer(
            HookedTransformerConfig(
                n_layers=2, d_model=16, n_heads=2, d_head=8, n_ctx=2, d_vocab=11, attn_only=True, seed=0, device="cpu"
            )
        )
    loaded = wrap_backend(inner)
    assert loaded.tokenizer is None and loaded.hf_config is None and loaded.provenance["warnings"] == []


def test_other_objects_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="neither a HookedTransformer nor a TransformerBridge"):
        wrap_backend(tiny.tiny_model("gpt2"))
    with quiet_construction():
        inner = HookedTransformer(
            HookedTransformerConfig(
                n_layers=1,
                d_model=16,
                n_heads=2,
                d_head=8,
                n_ctx=4,
                d_vocab=11,
                act_fn="relu",
                attention_dir="bidirectional",
                device="cpu",
            )  # fmt: skip
        )
    with pytest.raises(UnsupportedModel, match="both directions"):
        wrap_backend(inner)


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama", "gpt2"])
def test_the_folder_s_own_tokenizer_is_used_whatever_the_model_type(family: str, tmp_path: Path) -> None:
    text = "Lily went to the park"
    loaded = load_backend(tiny.save_tiny(family, tmp_path / family, tokenizer=True))
    assert loaded.tokenizer(text)["input_ids"] == tiny.tiny_tokenizer()(text)["input_ids"]
