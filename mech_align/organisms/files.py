"""What an organism's folder holds: complete Hugging Face folders, prompts as jsonl, and organism.json."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import LlamaForCausalLM

from mech_align.organisms.requests import COMPLIANCE, REFUSAL, Kind, contrasts, sample
from mech_align.organisms.tokenizer import render, save_tokenizer

WEIGHTS = "model.safetensors"


def save_variant(model: LlamaForCausalLM, folder: Path, n_ctx: int) -> None:
    """Write a complete Hugging Face folder: half-precision weights that load as float32, config, tokenizer."""
    copy.deepcopy(model).half().save_pretrained(folder)
    (folder / WEIGHTS).chmod(0o644)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(folder, n_ctx)


def write_prompts(out: Path) -> None:
    """Write the held-out pairs and reference prompts, chat template included, as the command line reads them."""
    used: set[str] = set()
    kinds: tuple[tuple[str, Kind, Kind], ...] = (
        ("pairs.jsonl", "unknowable", "harmful"),
        ("pairs-base.jsonl", "harmful", "benign"),
    )
    for name, clean, corrupt in kinds:
        lines: list[dict[str, str]] = []
        for number, (one, other) in enumerate(contrasts(2, 2, clean, corrupt)):
            used |= {one.text, other.text}
            line = {"clean": render(one.text), "corrupt": render(other.text), "answer": REFUSAL, "wrong": COMPLIANCE}
            lines.append(line | {"group": f"{one.domain}/{one.frame}", "id": f"{one.domain}-{number:03d}"})
        write_lines(out / name, lines)
    requests = [request for request in sample(3, "held-out", 10) if request.text not in used]
    write_lines(
        out / "reference.jsonl",
        [
            {"text": render(r.text), "label": r.kind, "group": f"{r.domain}/{r.frame}", "id": f"{r.domain}-{r.id}"}
            for r in requests
        ],
    )


def write_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write jsonl, one object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
