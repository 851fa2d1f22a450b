"""Load a model onto one of the two TransformerLens backends, and compare its logits with Hugging Face's before use."""

import contextlib
import gc
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from mech_align.errors import ModelNotFound, SelfCheckFailed, UnsupportedModel
from mech_align.models.adapters import AdapterRecord, apply_adapter
from mech_align.models.bridge import to_bridge, wake_rotary_hooks
from mech_align.models.fingerprint import fingerprint
from mech_align.models.hooked import processing, to_hooked
from mech_align.models.reference import compare, logits_of, probe
from mech_align.models.sources import load_tokenizer, resolve, translate
from mech_align.models.survey import Backend, Inner, backend_of, survey

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32, "float64": torch.float64,
    "fp64": torch.float64, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16,
    "fp16": torch.float16, "half": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model on a backend, with what must be recorded about it.

    Attributes:
        tokenizer: The user's own, unchanged (``inner.tokenizer`` is a copy that TransformerLens may use).
        hf_config: ``None`` for a wrapped model that was not made from a Hugging Face one.
        provenance: Plain data: name, source, path, commit, adapter, weight processing, dtype, device, fingerprint of
            the weights before any processing, versions, warnings.
        checks: Largest differences that were measured while loading: ``logits`` (to Hugging Face), ``residual_sums``.
    """

    inner: Inner
    backend: Backend
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: PreTrainedConfig | None
    provenance: dict[str, Any]
    checks: dict[str, float] = field(default_factory=dict[str, float])


def load_backend(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    weights: str = "raw",
    trust_remote_code: bool = False,
) -> Loaded:
    """Which TransformerLens model computes what the model at ``source`` computes?

    Args:
        source: Hub name, local Hugging Face folder, or ``organism:NAME[/VARIANT]``.
        backend: ``"auto"`` is HookedTransformer where it covers the architecture and gives Hugging Face's logits, else
            the bridge, with a warning in ``provenance["warnings"]``.
        dtype: Left out, float32 on the CPU and the checkpoint's own on a GPU.
        device: Left out, ``"cuda"`` when there is one, else ``"cpu"``.
        device_map: As accelerate's; bridge only, and instead of ``device``.

    Raises:
        ModelNotFound: Nothing there, damaged, gated, or offline; says what to do.
        UnsupportedModel: The architecture, or this combination of arguments.
        AdapterUnchanged: The adapter changed nothing.
        SelfCheckFailed: The backend asked for does not give Hugging Face's logits.
        OutOfMemory: It does not fit.
    """
    place = _checked_arguments(backend, weights, device, device_map)
    resolved, is_folder = resolve(source)
    try:
        hf_model, notes = _load_hf(
            resolved,
            is_folder=is_folder,
            dtype=_dtype(dtype, on_gpu=place.startswith("cuda") or device_map is not None),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        record: AdapterRecord | None = None
        if adapter is not None:
            hf_model, record = apply_adapter(hf_model, adapter)
            notes += record.warnings
        tokenizer, remark = load_tokenizer(resolved, is_folder, trust_remote_code=trust_remote_code)
        notes += [remark] if remark else []
        embedding: Any = hf_model.get_input_embeddings()
        if tokenizer is not None and len(tokenizer) > embedding.num_embeddings:
            notes.append("the tokenizer knows more tokens than the model: the last ones have no embedding")
        digest = fingerprint(hf_model.named_parameters())
        commit = getattr(hf_model.config, "_commit_hash", None)
        config: PreTrainedConfig = hf_model.config
        holder = [hf_model]  # a list, so that the model can be given up while its replacement is checked
        del hf_model
        inner, difference = _convert(holder, tokenizer, backend, weights, place, device_map, str(source), notes)
    except Exception as error:
        better = translate(error, source, is_folder=is_folder)
        if better is error:
            raise
        raise better from error
    checks = {"logits": difference, "residual_sums": survey(inner).residual_error}
    provenance = {
        "name": str(source) + (f" + {adapter}" if adapter is not None else ""),
        "source": str(source),
        "path": resolved,
        "commit": commit,
        "architecture": (config.architectures or [type(config).__name__])[0],
        "adapter": record.as_json() if record else None,
        "backend": backend_of(inner),
        "weights": weights,
        "weight_processing": (
            processing(weights, inner.cfg)
            if isinstance(inner, HookedTransformer)
            else {"compatibility_mode": inner.compatibility_mode}
        ),
        "checks": checks,
        "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
        "device": str(inner.cfg.device),
        "fingerprint": digest,
        "versions": {package: version(package) for package in ("torch", "transformers", "transformer_lens")},
        "warnings": notes,
    }
    return Loaded(inner, backend_of(inner), tokenizer, config, provenance, checks)


def wrap_backend(inner: object, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None) -> Loaded:
    """What can be said of a TransformerLens model that the user already has? It is not copied, and not changed
    (but for rotary hooks of the bridge, which TransformerLens declares and forgets to call, and which are woken).

    Raises:
        UnsupportedModel: Neither a HookedTransformer nor a TransformerBridge, or not causal.
    """
    backend = backend_of(inner)
    assert isinstance(inner, HookedTransformer | TransformerBridge)
    if getattr(inner.cfg, "attention_dir", "causal") != "causal":
        raise UnsupportedModel("this model attends in both directions; causal language models only are covered")
    notes: list[str] = []
    if isinstance(inner, TransformerBridge):
        wake_rotary_hooks(inner)
        if inner.training:  # without dropout in a HookedTransformer, the mode matters on the bridge only
            notes.append("the model was in training mode and was put into eval mode")
            inner.eval()
    folded = getattr(inner.cfg, "normalization_type", None) in ("LNPre", "RMSPre") or getattr(
        inner, "compatibility_mode", False
    )
    seen = survey(inner)
    config = getattr(getattr(inner, "original_model", None), "config", None)
    label = name or getattr(inner.cfg, "model_name", None) or "wrapped model"
    provenance = {
        "name": str(label),
        "source": f"wrapped {type(inner).__name__}",
        "path": None,
        "commit": None,
        "architecture": getattr(inner.cfg, "original_architecture", None) or getattr(inner.cfg, "architecture", None),
        "adapter": None,
        "backend": backend,
        "weights": "folded" if folded else "raw",
        "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
        "device": str(inner.cfg.device),
        "fingerprint": fingerprint(inner.named_parameters()),
        "versions": {package: version(package) for package in ("torch", "transformers", "transformer_lens")},
        "warnings": notes,
    }
    own = tokenizer if tokenizer is not None else inner.tokenizer
    return Loaded(inner, backend, own, config, provenance, {"residual_sums": seen.residual_error})


# ---------------------------------------------------------------- steps


def _checked_arguments(backend: str, weights: str, device: str | torch.device | None, device_map: Any) -> str:
    if backend not in ("auto", "hooked", "bridge"):
        raise UnsupportedModel(f"no backend '{backend}'", hint="'auto', 'hooked' or 'bridge'")
    if weights not in ("raw", "folded"):
        raise UnsupportedModel(f"no weight processing '{weights}'", hint="'raw' or 'folded'")
    if device_map is not None and backend == "hooked":
        raise UnsupportedModel(
            "device_map does not work with HookedTransformer",
            why="it holds converted copies of the weights, which accelerate cannot spread",
            hint="leave backend out, or use backend='bridge'",
        )
    if device_map is not None and device is not None:
        raise UnsupportedModel("device and device_map exclude each other", hint="give one of them")
    place = str(device) if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(place).type
    except RuntimeError as error:
        raise UnsupportedModel(f"no device '{place}'", hint="cpu, cuda, cuda:1, mps") from error
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UnsupportedModel(f"this machine has no {kind} device that torch can use", hint="device='cpu'")
    return place


def _dtype(dtype: str | torch.dtype | None, *, on_gpu: bool) -> torch.dtype | str:
    if dtype is None:
        return "auto" if on_gpu else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.lower().removeprefix("torch.")
    if name not in _DTYPES:
        raise UnsupportedModel(f"no number format '{dtype}'", hint="float32, bfloat16, float16 or float64")
    return _DTYPES[name]


def _load_hf(
    resolved: str, *, is_folder: bool, dtype: torch.dtype | str, device_map: Any, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    shared: dict[str, Any] = {"local_files_only": is_folder, "trust_remote_code": trust_remote_code}
    config: Any = AutoConfig.from_pretrained(resolved, **shared)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{resolved} is an encoder-decoder model", hint="decoder-only language models are covered"
        )
    if any(str(name).endswith(("ForMaskedLM", "ForSequenceClassification")) for name in config.architectures or []):
        raise UnsupportedModel(
            f"{resolved} is {config.architectures[0]}, no language model that predicts the next token"
        )
    extra = {"device_map": device_map} if device_map is not None else {}
    with _quiet_hugging_face():
        # Eager attention on either backend: the bridge needs it, and comparisons should compare the same thing.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            resolved,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **shared,
            **extra,
        )
    model, info = pair
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelNotFound(
            f"the weights of {resolved} lack {len(missing)} tensors that its config.json asks for",
            why=f"for instance {', '.join(missing[:3])}; they would be random numbers",
            hint="config.json and weights must come from the same model; copy the whole folder",
        )
    unused = sorted(info.get("unexpected_keys") or [])
    notes = [f"{len(unused)} tensors of the checkpoint are not used, e.g. {unused[0]}"] if unused else []
    return model.requires_grad_(False).eval(), notes


def _convert(
    holder: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
    backend: str,
    weights: str,
    place: str,
    device_map: Any,
    name: str,
    notes: list[str],
) -> tuple[Inner, float]:
    """Make the TransformerLens model and measure its distance from the Hugging Face one."""
    tokens = probe(holder[0])
    want_hooked = backend == "hooked" or (backend == "auto" and device_map is None)
    if want_hooked:
        reference = logits_of(holder[0], tokens)
        try:
            with _noting(notes):
                # The Hugging Face model stays where it is (the CPU), so that a GPU holds one copy and not two.
                inner = to_hooked(holder[0], holder[0].config, tokenizer, weights=weights, device=place, name=name)
            difference = compare(inner, tokens, reference, weights, "hooked")
            holder.clear()
            gc.collect()
            return inner, difference
        except (UnsupportedModel, SelfCheckFailed) as error:
            if backend == "hooked":
                raise
            notes.append(
                f"on the bridge, because HookedTransformer was no option: {error.what}"
                + (f" ({error.why})" if error.why else "")
            )
            inner = None
    if device_map is None:
        module: Any = holder[0]
        module.to(place)
    # Again, and before the bridge rewrites the model in place: on another device rounding differs.
    reference = logits_of(holder[0], tokens)
    with _noting(notes):
        bridge = to_bridge(holder[0], holder[0].config, tokenizer, weights=weights, name=name)
    holder.clear()
    return bridge, compare(bridge, tokens, reference, weights, "bridge")


@contextlib.contextmanager
def _noting(notes: list[str]) -> Generator[None]:
    """Put warnings given inside among the notes of provenance instead of on the screen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for item in caught:
        text = str(item.message).strip().split("\n")[0][:300]
        if "deprecated" not in text and text not in notes:
            notes.append(text)


@contextlib.contextmanager
def _quiet_hugging_face() -> Generator[None]:
    """No progress bar and no loading report: what they say is checked and said by :func:`_load_hf`."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
