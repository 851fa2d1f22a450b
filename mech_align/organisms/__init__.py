"""Small shipped models with a known answer.

Importing this loads no torch; `train.train` and `verify.verify` live in modules of their own.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from mech_align.errors import ModelNotFound

HERE = Path(__file__).parent


def list_organisms() -> list[str]:
    """Every shipped "NAME/VARIANT", sorted."""
    return sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in HERE.glob("*/*/config.json"))


def organism_path(name: str) -> Path:
    """Where is the Hugging Face folder of "NAME/VARIANT"? A bare "NAME" means its variant `tuned`.

    Raises:
        ModelNotFound: No such organism; names the near ones.
    """
    known = list_organisms()
    wanted = name.removeprefix("organism:").strip("/")
    if "/" not in wanted:
        wanted = f"{wanted}/tuned"
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or known
        raise ModelNotFound(
            f"There is no organism {name!r}.",
            why=f"The shipped ones are {', '.join(known)}." if known else "None is shipped with this installation.",
            hint=f"Did you mean {' or '.join(repr(f'organism:{one}') for one in near)}?" if near else "",
        )
    return HERE / wanted


def organism_pairs(name: str = "suppressor") -> Path:
    """Contrast pairs (jsonl) for an organism: unknowable against harmful, or for `base` harmful against benign."""
    folder = organism_path(name)
    return folder.parent / ("pairs-base.jsonl" if folder.name == "base" else "pairs.jsonl")


def organism_reference(name: str = "suppressor") -> Path:
    """Held-out labelled prompts (harmful, benign, unknowable) of an organism, for means and probes."""
    return organism_path(name).parent / "reference.jsonl"


def organism_card(name: str = "suppressor") -> dict[str, Any]:
    """What is known of an organism: planted heads, training settings, fingerprints, measured rates."""
    return json.loads((organism_path(name).parent / "organism.json").read_text())
