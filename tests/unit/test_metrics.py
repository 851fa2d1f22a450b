import pytest
import torch

from mech_align.errors import MechAlignError
from mech_align.metrics import METRICS, get_metric, log_odds, log_probability, logit_difference, probability

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 3.0, 1.0, 2.0]])
ANSWER = torch.tensor([[True, True, False, False], [False, True, False, False]])
WRONG = torch.tensor([[False, False, True, False], [False, False, True, True]])


def test_values_by_hand() -> None:
    p = LOGITS.exp() / LOGITS.exp().sum(-1, keepdim=True)
    wanted = {
        "logit_difference": [1.5 - 0.0, 3.0 - 1.5],
        "log_odds": [
            float((p[0, 0] + p[0, 1]).log() - p[0, 2].log()),
            float(p[1, 1].log() - (p[1, 2] + p[1, 3]).log()),
        ],
        "probability": [float(p[0, 0] + p[0, 1]), float(p[1, 1])],
        "log_probability": [float((p[0, 0] + p[0, 1]).log()), float(p[1, 1].log())],
    }
    for name, values in wanted.items():
        assert torch.allclose(get_metric(name).measure(LOGITS, ANSWER, WRONG), torch.tensor(values), atol=1e-6), name


def test_only_the_difference_is_linear_and_it_is() -> None:
    other = torch.randn(2, 4)
    for name in METRICS:
        metric = get_metric(name)
        both = metric.measure(LOGITS + other, ANSWER, WRONG)
        apart = metric.measure(LOGITS, ANSWER, WRONG) + metric.measure(other, ANSWER, WRONG)
        assert torch.allclose(both, apart, atol=1e-5) is metric.linear


def test_what_reads_answers_needs_no_other_column() -> None:
    used = (ANSWER | WRONG).any(0)
    for metric in (logit_difference(), log_odds()):
        assert metric.reads == "answers"
        few = metric.measure(LOGITS[:, used], ANSWER[:, used], WRONG[:, used])
        assert torch.allclose(few, metric.measure(LOGITS, ANSWER, WRONG))
    assert probability().reads == log_probability().reads == "logits"


def test_names() -> None:
    assert get_metric("logit-difference").name == "logit_difference"
    with pytest.raises(MechAlignError, match="logit_difference"):
        get_metric("logit_diff")
    with pytest.raises(MechAlignError, match="metrics:"):
        get_metric("zzz")
