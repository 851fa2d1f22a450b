"""The options of every command, as the parser and the manifest see them."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

ModelName = Annotated[str, tyro.conf.arg(metavar="M")]
Json = Annotated[bool, tyro.conf.arg(name="json", help_behavior_hint="")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def _hint(metavar: str, default: str) -> Any:
    """How an option that may be left out is shown."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


class Options(BaseModel):
    """What every command takes."""

    model_config = ConfigDict(extra="forbid")

    as_json: Json = Field(False, description="One JSON document on stdout and nothing else, errors included.")
    traceback: Flag = Field(False, description="Show the whole Python traceback of an error.")


class Running(Options):
    """What a command takes that runs a model and fills a folder."""

    out: Annotated[Path | None, _hint("DIR", "runs/COMMAND-…")] = Field(
        None, description="Run folder. The same command on the same folder goes on where it stopped."
    )
    dry_run: Flag = Field(False, description="Print passes, memory and time; run nothing, write nothing.")
    backend: Literal["auto", "hooked", "bridge"] = Field(
        "auto", description="HookedTransformer, TransformerBridge, or whichever covers the architecture."
    )
    device: Annotated[str | None, _hint("NAME", "a GPU where there is one")] = Field(
        None, description="cpu, cuda, cuda:1, mps."
    )
    dtype: Annotated[str | None, _hint("NAME", "float32 on a CPU, else as stored")] = Field(
        None, description="float32, bfloat16, float16 or float64."
    )
    batch_size: Annotated[int | None, _hint("N", "automatic")] = Field(None, ge=1, description="Prompts at a time.")
    seed: int = Field(0, description="Of everything that is drawn at random.")


class Source(BaseModel):
    """Model and prompts; a base class so that they come first in the help."""

    model: ModelName = Field(description="Hub name, local Hugging Face folder, or organism:NAME[/VARIANT].")
    pairs: Annotated[str, tyro.conf.arg(metavar="FILE")] = Field(
        description="jsonl, csv, parquet or hub data set with clean, corrupt, answer, wrong; group for templates."
    )


class OnPairs(Running, Source):
    """What a command takes that compares clean and corrupt prompts."""

    metric: Annotated[str | None, _hint("NAME", "what suits the command")] = Field(
        None, description="logit_difference, log_odds, probability or log_probability."
    )
    adapter: Annotated[str | None, _hint("A", "none")] = Field(
        None, description="PEFT adapter, applied first and proved to have changed the weights."
    )
    weights: Literal["raw", "folded"] = Field(
        "raw", description="Weights as they are, or folded and centred by TransformerLens."
    )
    trust_remote_code: Flag = Field(False, description="Run Python code that comes with the model.")
    ragged: Literal["align", "drop", "error"] = Field(
        "align", description="Pairs of unequal length: pair common beginning and end, leave them out, or stop."
    )
    answers: Literal["single", "first-token"] = Field(
        "single", description="Every answer has to be one token, or the first token of several counts."
    )
    chat: Flag = Field(False, description="Put each prompt into the tokenizer's chat template, as one user turn.")
    system: Annotated[str | None, _hint("TEXT", "none")] = Field(None, description="System prompt; implies --chat.")

    # What decides no number, or is told apart by a fingerprint.
    UNPLANNED: ClassVar[frozenset[str]] = frozenset(
        {"as_json", "traceback", "out", "dry_run", "batch_size", "device", "model", "pairs", "adapter", "source_model",
         "trust_remote_code", "backend", "dtype", "weights", "system", "chat"}
    )  # fmt: skip

    def plan(self) -> dict[str, Any]:
        """Everything that decides the numbers, besides model and data."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in self.UNPLANNED}


class Layered(OnPairs):
    """Patching options."""

    layers: Annotated[str | None, _hint("LAYERS", "all")] = Field(
        None, description="Such as 62,63 or 0-5 or all, counted from 0."
    )
    positions: Annotated[str | None, _hint("last|all|each|NAME", "all; each for resid")] = Field(
        None, description="Where to patch: last token, all at once, each on its own, or a named position."
    )
    direction: Literal["denoise", "noise"] = Field(
        "denoise", description="Clean values into the corrupt run, or corrupt values into the clean run."
    )
    min_gap: Annotated[float | None, _hint("X", "5% of the median gap")] = Field(
        None, gt=0, description="Pairs whose clean-corrupt gap is smaller count as unmeasured."
    )


class Patch(Layered):
    """Which parts, moved from the clean run into the corrupt run, bring the clean behaviour back?

    Heads by default, with the whole attention and MLP block of each layer beside them. The strongest are confirmed on
    prompts that did not choose them.
    """

    part: Literal["heads", "attn", "mlp", "resid", "neurons"] = Field("heads", description="What to patch.")
    source_model: Annotated[str | None, _hint("M", "none")] = Field(
        None, description="Take the values from this model (the base of a fine-tune) on the same prompts."
    )


class Attribute(Layered):
    """Which of very many parts might matter? A gradient screen, then exact patches of its top and of a sample."""

    part: Literal["heads", "attn", "mlp", "neurons"] = Field("heads", description="What to screen.")
    steps: int = Field(1, ge=1, description="Gradients to average between corrupt and clean (integrated gradients).")
    confirm: int = Field(20, ge=0, description="How many of the strongest to patch exactly.")
    sample: int = Field(30, ge=0, description="How many of the rest to patch exactly, at random: gives the miss rate.")
    threshold: Annotated[float | None, _hint("X", "a tenth of the largest")] = Field(
        None, gt=0, description="What counts as a large effect."
    )


class Dla(OnPairs):
    """How much does each head, MLP and embedding write directly towards the answer?"""

    run: Literal["clean", "corrupt"] = Field("clean", description="Which prompts to split.")


class Lens(OnPairs):
    """After which layer can the answer be read from the residual stream?"""

    part: Literal["resid_pre", "resid_mid", "resid_post"] = Field(
        "resid_post", description="Which point of each layer."
    )
    run: Literal["clean", "corrupt"] = Field("clean", description="Which prompts to read.")
    patched: Annotated[str | None, _hint("HEADS", "none")] = Field(
        None, description="Read again with these heads patched from the other run, such as L10H7,L10H3."
    )


class Ablate(OnPairs):
    """What happens when heads are taken out, each alone and all together, beside random ones?"""

    heads: Annotated[str, tyro.conf.arg(metavar="HEADS")] = Field(
        description="Such as L10H7,L10H3; parts such as L3.mlp work too."
    )
    mode: Literal["mean", "zero", "resample", "model"] = Field(
        "mean",
        description="What takes their place: mean over a reference, zero, another prompt's value, another model's.",
    )
    source_model: Annotated[str | None, _hint("M", "none")] = Field(
        None, description="The other model, for --mode model."
    )
    reference: Annotated[str, tyro.conf.arg(metavar="both|clean|corrupt|FILE")] = Field(
        "both", description="Prompts of the mean or the resampling: of the pairs, or a file with a column text."
    )
    run: Literal["corrupt", "clean"] = Field("corrupt", description="Which prompts to disturb.")
    positions: Annotated[str, tyro.conf.arg(metavar="last|all|NAME")] = Field("all", description="Where.")
    controls: int = Field(20, ge=0, description="Random sets of heads from the same layers.")
    greedy: int = Field(0, ge=0, description="Also search for further heads, one after the other, so many steps.")


class Demo(Running):
    """Patch, ablate and attribute a small shipped model whose answer is known. No network, under a minute."""


class Doctor(Options):
    """Is this machine ready? Says what to do where it is not. Makes no network call unless --online."""

    online: Flag = Field(False, description="Also ask the Hugging Face hub whether it answers.")


class Report(Options):
    """Write report.html of a run folder anew, from its results. Needs no model."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Field(description="The run folder.")
    open: Flag = Field(False, description="Show it in the browser.")


class OrganismList(Options):
    """Which small models with a known answer are shipped?"""


class OrganismTrain(Options):
    """Train a shipped model again from its script, on this machine."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = Field(
        "suppressor", description="Which one."
    )
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Field(description="Where to write it.")
    seed: int = Field(0, description="Of data and initial weights.")


class OrganismVerify(Options):
    """Measure again, from the weights, what is claimed of a shipped model."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = Field(
        "suppressor", description="Which one."
    )
    folder: Annotated[Path | None, _hint("DIR", "the shipped one")] = Field(
        None, description="Verify a model that was trained again instead of the shipped one."
    )
    quick: Flag = Field(False, description="Fewer prompts and controls.")
