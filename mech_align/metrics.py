"""Scores of a model's next-token prediction: one number per prompt, always in fp32, positive = more clean behaviour."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_align.errors import MechAlignError

Measure = Callable[
    [Float[Tensor, "row token"], Bool[Tensor, "row token"], Bool[Tensor, "row token"]], Float[Tensor, " row"]
]


@dataclass(frozen=True)
class Metric:
    """A named score of the logits at one position.

    Attributes:
        name: As on the command line and in provenance.
        unit: Of one value, e.g. ``"logits"``.
        reads: ``"answers"``: the token axis holds only the answer tokens of the batch; ``"logits"``: the whole
            vocabulary. A sweep unembeds no more columns than this asks for.
        measure: ``(logits, answer, wrong) -> values``; the masks say which tokens of a row are its right and wrong
            answers.
        linear: The score is a linear function of the logits, so that it splits exactly over the parts of the network.
    """

    name: str
    unit: str
    reads: Literal["answers", "logits"]
    measure: Measure
    linear: bool = False


def _mean(logits: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(logits.dtype)
    return (logits * weight).sum(-1) / weight.sum(-1)


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, -torch.inf).logsumexp(-1)


def logit_difference() -> Metric:
    r"""How much more does the model lean to the right tokens than to the wrong ones?

    $$\frac{1}{|A|}\sum_{a \in A} \ell_a - \frac{1}{|W|}\sum_{w \in W} \ell_w$$

    Linear in the logits, so direct logit attribution splits it exactly.

    Reference:
        Wang et al. 2022, arXiv:2211.00593, section 2.
    """
    return Metric("logit_difference", "logits", "answers", lambda x, a, w: _mean(x, a) - _mean(x, w), linear=True)


def log_odds() -> Metric:
    r"""The log-odds of the right token set against the wrong one: $\log \sum_A e^{\ell_a} - \log \sum_W e^{\ell_w}$."""
    return Metric("log_odds", "nats", "answers", lambda x, a, w: _logsumexp(x, a) - _logsumexp(x, w))


def probability() -> Metric:
    """The probability of the right token set, over the whole vocabulary."""
    return Metric("probability", "probability", "logits", lambda x, a, w: (x.softmax(-1) * a).sum(-1))


def log_probability() -> Metric:
    """The log-probability of the right token set, over the whole vocabulary."""
    return Metric("log_probability", "nats", "logits", lambda x, a, w: _logsumexp(x.log_softmax(-1), a))


METRICS: dict[str, Callable[[], Metric]] = {
    "logit_difference": logit_difference,
    "log_odds": log_odds,
    "probability": probability,
    "log_probability": log_probability,
}


def get_metric(name: str) -> Metric:
    """The metric of this name.

    Raises:
        MechAlignError: No such metric; names the near ones.
    """
    key = name.replace("-", "_")
    if key not in METRICS:
        near = get_close_matches(key, METRICS, n=2)
        raise MechAlignError(
            f"no metric '{name}'", hint=f"did you mean {near[0]}?" if near else f"metrics: {', '.join(METRICS)}"
        )
    return METRICS[key]()
