"""PEFT adapters: always merged into the weights, and proved to have changed them.

On some architectures both TransformerLens backends ignore an unmerged adapter without a word, and PEFT loads one whose
names do not match the model with no more than a warning. Either way a comparison of base and tuned model would compare
the base model with itself.
"""

import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mech_align.errors import AdapterUnchanged, ModelNotFound, SelfCheckFailed, UnsupportedModel
from mech_align.models.fingerprint import digests
from mech_align.models.reference import probe


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter did to the weights.

    Attributes:
        source: Folder or hub name.
        kind: PEFT type, such as ``"LORA"``.
        config_digest: Digest of ``adapter_config.json``.
        n_changed: Tensors of the base model that differ after the merge.
        n_tensors: Tensors of the base model.
        relative_change: Per layer (``"3"``, or ``"other"``), the Frobenius norm of the change of the merged
            matrices over that of the matrices before.
        warnings: What PEFT, or a check here, had to remark.
    """

    source: str
    kind: str
    config_digest: str
    n_changed: int
    n_tensors: int
    relative_change: dict[str, float]
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The record as plain data, for provenance."""
        return {**asdict(self), "warnings": list(self.warnings)}


def apply_adapter(hf_model: PreTrainedModel, path: str | Path) -> tuple[PreTrainedModel, AdapterRecord]:
    """What does the model look like with the adapter merged in, and what did that change?

    Args:
        hf_model: The base model; its weights are changed in place.
        path: Adapter folder, or hub name.

    Returns:
        The merged model, without any PEFT module, and the record.

    Raises:
        ModelNotFound: No adapter there; says which file is missing.
        AdapterUnchanged: No weight changed, or part of the adapter found no place in this model.
        UnsupportedModel: Made for another vocabulary or for other sizes, or of a kind that cannot be merged.
        SelfCheckFailed: The merged model is not the adapted one.
    """
    _check_folder(path)
    before = digests(hf_model.named_parameters())
    wrapped, config, noted = _load(hf_model, path)
    lost, missing = _unmatched_keys(wrapped, path)
    if lost:
        raise AdapterUnchanged(
            f"{len(lost)} tensors of the adapter {path} have no place in this model",
            why=f"for instance {', '.join(lost[:3])}",
            hint="check that this is the base model that the adapter was trained on: "
            f"it says '{config.base_model_name_or_path}'",
        )
    if missing:
        noted.append(f"the adapter holds no values for {len(missing)} of its own tensors, e.g. {missing[0]}")
    tokens = probe(hf_model).to(hf_model.device)
    with torch.no_grad():
        want = wrapped(tokens).logits.float()
    change = _merge_one_by_one(wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(All|Some) adapters are already merged|Already following adapters")
        merged: Any = wrapped.merge_and_unload()
    _check_merge(merged, tokens, want, path)
    after = digests(merged.named_parameters())
    known = set(before.values())  # an untied embedding is new by name, and changed only if it is new by value
    changed = [
        name for name in after if after[name] != before.get(name) and (name in before or after[name] not in known)
    ]
    if not changed:
        raise AdapterUnchanged(
            f"the adapter {path} changes no weight of this model",
            why="after merging, every tensor is what it was: the adapter is untrained (all-zero), "
            "or too small for the number format of the model",
            hint=[
                "check that training wrote the adapter at its end",
                "for a very small adapter load with dtype='float32'",
            ],
        )
    record = AdapterRecord(
        source=str(path),
        kind=str(getattr(config.peft_type, "value", config.peft_type)),
        config_digest=_config_digest(config),
        n_changed=len(changed),
        n_tensors=len(before),
        relative_change=change,
        warnings=tuple(noted),
    )
    return merged.requires_grad_(False).eval(), record


def _check_folder(path: str | Path) -> None:
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelNotFound(f"{path} is a file", hint=f"give the adapter's folder: {folder.parent}")
    if not folder.exists():
        if isinstance(path, Path) or str(path).startswith((".", "/", "~")):
            near = [str(other) for other in _adapters_near(folder)]
            raise ModelNotFound(
                f"no adapter folder {path}", hint=f"adapters near it: {', '.join(near)}" if near else ""
            )
        return
    if not (folder / "adapter_config.json").is_file():
        near = [str(other) for other in _adapters_near(folder / "x")]
        hint = [f"adapters inside it: {', '.join(near)}"] if near else []
        if (folder / "config.json").is_file():
            hint.append("this is a whole model: give it as the model, without an adapter")
        raise ModelNotFound(
            f"{path} is no adapter folder: adapter_config.json is missing",
            hint=[*hint, "PEFT writes adapter_config.json and adapter_model.safetensors with save_pretrained"],
        )
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ModelNotFound(
            f"the adapter folder {path} has no weights",
            why="neither adapter_model.safetensors nor adapter_model.bin is there",
            hint="copy the whole folder; with git-lfs, run `git lfs pull`",
        )


def _adapters_near(folder: Path) -> list[Path]:
    parent = folder.parent
    return [found.parent for found in sorted(parent.glob("*/adapter_config.json"))[:5]] if parent.is_dir() else []


def _load(hf_model: PreTrainedModel, path: str | Path) -> tuple[Any, Any, list[str]]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UnsupportedModel("adapters need the package peft", hint="pip install peft") from error
    device = str(next(hf_model.parameters()).device)
    source = str(Path(path).expanduser()) if Path(path).expanduser().exists() else str(path)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrapped: Any = PeftModel.from_pretrained(hf_model, source, torch_device=device)
    except Exception as error:
        raise _readable(error, path, hf_model) from error
    config: Any = wrapped.peft_config["default"]
    if config.is_prompt_learning or not hasattr(wrapped, "merge_and_unload"):
        raise UnsupportedModel(
            f"a {config.peft_type} adapter adds tokens or modules and cannot be merged into weights",
            hint="LoRA, rsLoRA, DoRA, IA3 and their like can be",
        )
    noted = [
        str(item.message).split("\n")[0][:200] for item in caught if "peft" in (item.filename or "").replace("\\", "/")
    ]
    return wrapped, config, [text for text in noted if "missing adapter keys" not in text]


def _readable(error: Exception, path: str | Path, hf_model: PreTrainedModel) -> Exception:
    text = str(error)
    sizes = re.search(r"size mismatch for (\S+): copying a param with shape torch.Size\(\[(\d+)[^]]*\]\)", text)
    if sizes and re.search(r"embed|lm_head|wte", sizes[1]):
        have = hf_model.config.get_text_config().vocab_size
        return UnsupportedModel(
            f"the adapter {path} was trained with a vocabulary of {sizes[2]} tokens, the model has {have}",
            why="tokens were added before training, and the adapter holds embeddings for them",
            hint="merge it once by hand: model.resize_token_embeddings(...), PeftModel.from_pretrained, "
            "merge_and_unload, save_pretrained; then load that folder",
        )
    if "size mismatch" in text:
        return UnsupportedModel(
            f"the adapter {path} was made for a model of other sizes",
            why=" ".join(text.split())[:200],
            hint="adapter_config.json names its base model",
        )
    if "arget modules" in text and "not found" in text:
        return AdapterUnchanged(
            f"the adapter {path} finds none of its target modules in {type(hf_model).__name__}",
            why=" ".join(text.split())[:200],
            hint="it was trained on another architecture: adapter_config.json names its base model",
        )
    if type(error).__name__ == "SafetensorError":
        return ModelNotFound(
            f"the weights of the adapter {path} are damaged", why=text[:200], hint="copy or download the folder again"
        )
    if isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub") or "Can't find" in text:
        return ModelNotFound(
            f"no adapter {path}, neither as a folder nor on the hub",
            why=" ".join(text.split())[:200],
            hint="give the folder that holds adapter_config.json; a private adapter needs HF_TOKEN",
        )
    return UnsupportedModel(
        f"the adapter {path} does not load into {type(hf_model).__name__}", why=f"{type(error).__name__}: {text[:200]}"
    )


def _unmatched_keys(wrapped: Any, path: str | Path) -> tuple[list[str], list[str]]:
    """Tensors of the adapter file that landed nowhere, and tensors of the adapter that the file does not fill."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    source = str(Path(path).expanduser()) if Path(path).expanduser().exists() else str(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = set_peft_model_state_dict(wrapped, load_peft_weights(source, device="cpu"))
    own = [name for name in result.missing_keys if ".default" in name or "modules_to_save" in name]
    return sorted(result.unexpected_keys), sorted(own)


def _merge_one_by_one(wrapped: Any) -> dict[str, float]:
    """Merge each adapted matrix, and measure what that changed while only one old copy is held."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    change: dict[str, list[float]] = {}
    for name, module in wrapped.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight = _base_weight(module)
        if weight is None:
            continue
        old = weight.detach().clone()
        _untie(wrapped, weight)
        module.merge()
        new = _base_weight(module)
        layer = re.search(r"\.(?:h|layers|blocks|block)\.(\d+)\.", f".{name}.")
        sums = change.setdefault(layer[1] if layer else "other", [0.0, 0.0])
        if new is not None:
            sums[0] += float((new.detach().float() - old.float()).square().sum())
        sums[1] += float(old.float().square().sum())
    return {layer: (moved / size) ** 0.5 if size else float("nan") for layer, (moved, size) in change.items()}


def _untie(wrapped: Any, weight: Tensor) -> None:
    """Where input and output embedding are one tensor, give the output its own: an adapter on either means only one."""
    base = wrapped.get_base_model()
    head: Any = base.get_output_embeddings()
    head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    table: Any = base.get_input_embeddings()
    table = table.get_base_layer() if hasattr(table, "get_base_layer") else table
    if head is not None and head.weight is table.weight and weight is head.weight:
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _check_merge(merged: Any, tokens: Tensor, want: Tensor, path: str | Path) -> None:
    """The merged model must be the adapted one. In half precision the merge itself rounds, so nothing can be said."""
    with torch.no_grad():
        got = merged(tokens).logits
    if got.dtype not in (torch.float32, torch.float64):
        return
    worst, size = float((got.float() - want).abs().max()), max(1.0, float(want.abs().max()))
    if not worst <= 1e-3 * size:
        raise SelfCheckFailed(
            f"merging the adapter {path} gives another model than the adapter itself",
            why=f"logits differ by up to {worst:.3g}",
            hint="merge it by hand with peft, compare, save_pretrained, and load that folder",
        )


def _base_weight(module: Any) -> Tensor | None:
    base: nn.Module = module.get_base_layer()
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, Tensor) and torch.is_floating_point(weight) else None


def _config_digest(config: Any) -> str:
    plain = json.dumps(
        config.to_dict(), sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return hashlib.sha256(plain.encode()).hexdigest()[:16]
