"""Where a model comes from: hub name, folder or organism; and what went wrong, in words that say what to do."""

import difflib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mech_align.errors import MechAlignError, ModelNotFound, OutOfMemory, UnsupportedModel

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolve(source: str | Path) -> tuple[str, bool]:
    """The name or folder to hand to Hugging Face, and whether it is a folder.

    Raises:
        ModelNotFound: A file, a folder without a model, or a path that does not exist; names what is near or missing.
    """
    text = str(source).strip()
    if not text:
        raise ModelNotFound("no model given", hint="a hub name, a local folder, or organism:NAME/VARIANT")
    if isinstance(source, str) and text.startswith("organism:"):
        from mech_align.organisms import organism_path

        return str(organism_path(text.removeprefix("organism:"))), True
    folder = Path(text).expanduser()
    if folder.is_file():
        raise ModelNotFound(
            f"{text} is a file, not a model folder",
            why="a model is a folder with config.json, weights and tokenizer files",
            hint=f"give its folder: {folder.parent}",
        )
    if folder.is_dir():
        _check_folder(folder)
        return str(folder), True
    # With one slash at most it may be the name of a model on the hub.
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text
    if is_path:
        near = _near(folder)
        raise ModelNotFound(
            f"no folder {text}",
            why=f"looked from {Path.cwd()}" if not folder.is_absolute() else "",
            hint=[f"did you mean {', '.join(near)}?"] if near else ["give the folder that holds config.json"],
        )
    return text, False


def load_tokenizer(
    resolved: str, is_folder: bool, *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The tokenizer beside the weights, as Hugging Face makes it; ``None`` and the reason where there is none."""
    if is_folder and not any((Path(resolved) / name).is_file() for name in _TOKENIZER_FILES):
        if not trust_remote_code or not (Path(resolved) / "tokenizer_config.json").is_file():
            return None, "the folder holds no tokenizer: prompts must be token ids"
    try:
        if is_folder and _names_no_family(Path(resolved)):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(resolved, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                resolved, local_files_only=is_folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        return (
            None,
            f"the tokenizer did not load ({type(error).__name__}: {_one_line(error, 160)}): prompts must be token ids",
        )
    return tokenizer, ""


def _names_no_family(folder: Path) -> bool:
    """Whether ``tokenizer.json`` is all there is to the tokenizer.

    Given such a folder, AutoTokenizer goes by the model's type instead: a word-level tokenizer beside a Qwen2 model
    gets Qwen2's own splitting, and every word becomes unknown.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    generic = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return generic and "auto_map" not in settings and (folder / "tokenizer.json").is_file()


def translate(error: Exception, source: object, *, is_folder: bool) -> Exception:
    """The error of a Hugging Face loading function as one of ours, or itself where nothing is known about it."""
    if isinstance(error, MechAlignError):
        return error
    chain = list(_chain(error))
    kinds = {type(item).__name__ for item in chain}
    text = _one_line(error)
    every = " ".join(str(item) for item in chain)
    if out_of_memory(error):
        return OutOfMemory(
            f"{source} does not fit into memory",
            why=text[:200],
            hint=[
                "dtype='bfloat16' halves it",
                "backend='bridge' keeps one copy of the weights",
                "device_map='auto' spreads it",
            ],
        )
    if kinds & {"GatedRepoError"} or "gated repo" in every or "403 Client Error" in every:
        return ModelNotFound(
            f"{source} is gated: its owners ask you to accept their terms first",
            hint=[f"open https://huggingface.co/{source} and accept", "then `hf auth login`, or set HF_TOKEN"],
        )
    if "trust_remote_code" in every:
        return UnsupportedModel(
            f"{source} brings its own Python code, which is not run unless you say so",
            hint="read that code, then pass trust_remote_code=True",
        )
    if "does not recognize this architecture" in every or "Unrecognized model" in every:
        return UnsupportedModel(
            f"transformers does not know the architecture of {source}",
            why=text.split(". ")[0][:200],
            hint="look at model_type in its config.json; a newer transformers may know it",
        )
    if "Unrecognized configuration class" in every:
        return UnsupportedModel(
            f"{source} is no causal language model",
            why=text[:160],
            hint="decoder-only models that predict the next token",
        )
    if "SafetensorError" in kinds or "UnpicklingError" in kinds:
        return ModelNotFound(
            f"the weights of {source} are damaged or incomplete",
            why=text[:200],
            hint=["copy or download them again", "a file of some 130 bytes is a git-lfs pointer: run `git lfs pull`"],
        )
    if "JSONDecodeError" in kinds or "not a valid JSON" in every:
        return ModelNotFound(f"config.json of {source} is not valid JSON", why=text[:200], hint="copy it again")
    if "size mismatch" in every or "ignore_mismatched_sizes" in every:
        return ModelNotFound(
            f"the weights of {source} do not fit its config.json",
            why="tensors have other shapes than the configuration says",
            hint="config.json and weights must come from the same model",
        )
    if isinstance(error, OSError) or kinds & {
        "HFValidationError",
        "RepositoryNotFoundError",
        "LocalEntryNotFoundError",
    }:
        return _not_found(source, is_folder, kinds, every)
    return error


def out_of_memory(error: BaseException) -> bool:
    """Is this error, or one behind it, about memory?"""
    for item in _chain(error):
        if isinstance(item, (MemoryError, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(item, RuntimeError) and ("out of memory" in str(item) or "can't allocate memory" in str(item)):
            return True
    return False


def _not_found(source: object, is_folder: bool, kinds: set[str], every: str) -> ModelNotFound:
    if is_folder:
        return ModelNotFound(f"the folder {source} does not load as a model", why=" ".join(every.split())[:200])
    near = _near(Path(str(source)))
    hints = [f"a folder near that name: {', '.join(near)}"] if near else []
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if offline:
        why = "there is no such folder, it is not in the local cache, and HF_HUB_OFFLINE=1 forbids to download it"
        hints += ["unset HF_HUB_OFFLINE to download it"]
    elif "HFValidationError" in kinds:
        why = "there is no such folder, and it cannot be a name on the hub"
    elif "RepositoryNotFoundError" in kinds or "404 Client Error" in every or "401 Client Error" in every:
        why = "there is no such folder, and the hub knows no such model that you may see"
        hints += ["check the spelling: OWNER/NAME", "for a private model set HF_TOKEN or run `hf auth login`"]
    else:
        why = "there is no such folder, it is not in the local cache, and the hub did not answer"
        hints += [
            "check the spelling and the network",
            "or give a local folder; the shipped models are organism:NAME/VARIANT",
        ]
    return ModelNotFound(f"no model {source}", why=why, hint=hints)


def _check_folder(folder: Path) -> None:
    names = {item.name for item in folder.iterdir()}
    if "config.json" in names:
        weights = [name for name in names if name.endswith((".safetensors", ".bin")) or name in _WEIGHT_FILES]
        if not weights:
            raise ModelNotFound(
                f"the folder {folder} has a config.json and no weights",
                why="model.safetensors (or its shards with model.safetensors.index.json) is missing",
                hint="copy the whole folder; with git-lfs, run `git lfs pull`",
            )
        _check_shards(folder)
        return
    hints: list[str] = []
    if "adapter_config.json" in names:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "BASE"
        hints.append(f"this is an adapter: load its base model with it, e.g. model={base}, adapter={folder}")
    inside = sorted(str(item.parent) for item in folder.glob("*/config.json"))[:5]
    if inside:
        hints.append(f"models inside it: {', '.join(inside)}")
    if any(name.endswith(".gguf") for name in names):
        hints.append("gguf files are not read: convert the model to a Hugging Face folder")
    absent = [
        name for name, there in (
            ("config.json", False),
            ("model.safetensors", any(item.endswith((".safetensors", ".bin")) for item in names)),
            ("tokenizer.json", any(item in names for item in _TOKENIZER_FILES)),
        ) if not there
    ]  # fmt: skip
    raise ModelNotFound(
        f"the folder {folder} is no Hugging Face model",
        why=f"missing: {', '.join(absent)}",
        hint=hints or "give the folder that save_pretrained wrote",
    )


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
    absent = sorted(name for name in shards if not (folder / name).is_file())
    if absent:
        raise ModelNotFound(
            f"the folder {folder} lacks {len(absent)} of {len(shards)} weight files",
            why=", ".join(absent[:4]),
            hint="copy the whole folder",
        )


def _near(folder: Path) -> list[str]:
    """Names beside the path that look like it, model folders only."""
    parent = folder.parent
    if not parent.is_dir():
        return []
    models = [item.name for item in parent.iterdir() if (item / "config.json").is_file()]
    close = difflib.get_close_matches(folder.name, models, n=3, cutoff=0.5) or sorted(models)[:3]
    return [str(parent / name) for name in close]


def _chain(error: BaseException) -> Generator[BaseException]:
    seen: set[int] = set()
    item: BaseException | None = error
    while item is not None and id(item) not in seen:
        seen.add(id(item))
        yield item
        item = item.__cause__ or item.__context__


def _one_line(error: Any, limit: int = 400) -> str:
    return " ".join(str(error).split())[:limit]
