"""Labelled prompts: counting, balancing, and splits that share no group."""

import pytest
from tokenizers_for_tests import CHAT, byte_level

from mech_align.errors import BadPrompts
from mech_align.prompts import ChatTemplate, LabelledPrompts


def forty() -> LabelledPrompts:
    """40 prompts in 20 groups of two; one in four groups is harmful."""
    groups = [f"g{i // 2}" for i in range(40)]
    labels = ["harmful" if i // 2 % 4 == 0 else "fine" for i in range(40)]
    return LabelledPrompts.from_lists([f"text {i}" for i in range(40)], labels, groups)


def test_counts_and_balance() -> None:
    prompts = forty()
    assert prompts.counts() == {"fine": 30, "harmful": 10}
    even = prompts.balanced(seed=3)
    assert even.counts() == {"fine": 10, "harmful": 10}
    assert even == prompts.balanced(seed=3)
    assert even != prompts.balanced(seed=4)
    assert list(map(int, even.id)) == sorted(map(int, even.id))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.01, 0.99])
def test_split_by_group(seed: int, fraction: float) -> None:
    prompts = forty()
    train, test = prompts.split(fraction, seed)
    assert not set(train.group) & set(test.group)
    assert sorted(train.id + test.id) == sorted(prompts.id)
    assert set(train.label) == set(test.label) == {"fine", "harmful"}
    if fraction in (0.5, 0.8):
        assert len(train) == pytest.approx(40 * fraction, abs=2)
    assert (train, test) == prompts.split(fraction, seed)


def test_split_depends_on_the_seed() -> None:
    assert len({forty().split(0.5, seed)[0].id for seed in range(6)}) > 1


def test_split_says_which_label_stands_on_one_side() -> None:
    prompts = LabelledPrompts.from_lists(list("abcd"), ["x", "x", "y", "y"], ["1", "1", "2", "2"])
    train, test = prompts.split(0.5)
    assert any("one side only: x, y" in note for note in train.notes)
    assert len(train) == len(test) == 2
    with pytest.raises(BadPrompts, match="one group"):
        LabelledPrompts.from_lists(["a", "b"], [0, 1], ["g", "g"]).split()
    with pytest.raises(BadPrompts, match="between 0 and 1"):
        prompts.split(1.0)


def test_adding_keeps_ids_apart() -> None:
    one, two = (LabelledPrompts.from_lists(["a", "b"], [name] * 2) for name in ("harmful", "harmless"))
    both = one + two
    assert both.counts() == {"harmful": 2, "harmless": 2}
    assert len(set(both.id)) == len(set(both.group)) == 4
    with pytest.raises(BadPrompts, match="different chat templates"):
        one + two.with_chat(ChatTemplate())


def test_choosing() -> None:
    prompts = forty()
    assert prompts.where("harmful").counts() == {"harmful": 10}
    assert len(prompts.where(lambda name: name != "harmful")) == 30
    with pytest.raises(BadPrompts, match="No prompt has the label 'bad'") as caught:
        prompts.where("bad")
    assert "fine, harmful" in caught.value.hints[0]
    assert prompts[3:5].text == ("text 3", "text 4")
    assert prompts[-1].text == ("text 39",)
    assert "fine: 30, harmful: 10" in repr(prompts)
    assert "fine 30, harmful 10" in prompts.describe()


def test_encoding() -> None:
    tokenizer = byte_level(adds_bos=True, chat=CHAT)
    prompts = LabelledPrompts.from_lists(["Lily", "Tim went"], [1, 0])
    assert prompts.label == ("1", "0")
    assert prompts.encode(tokenizer) == [tokenizer.encode("Lily"), tokenizer.encode("Tim went")]
    chats = prompts.with_chat(ChatTemplate()).encode(tokenizer)
    assert tokenizer.decode(chats[0]) == "<|endoftext|><|user|>Lily<|end|><|assistant|>"
    assert prompts.with_chat(ChatTemplate()).fingerprint != prompts.fingerprint
    with pytest.raises(BadPrompts, match="longer than the model's context of 2"):
        prompts.encode(tokenizer, n_ctx=2)


def test_bad_lists() -> None:
    with pytest.raises(BadPrompts, match="prompt 0, field `label`: found nothing"):
        LabelledPrompts.from_lists(["a"], [None])
    with pytest.raises(BadPrompts, match="text 2, label 1"):
        LabelledPrompts.from_lists(["a", "b"], [1])
    with pytest.raises(BadPrompts, match="`text` is one str"):
        LabelledPrompts.from_lists("ab", [1, 2])
    with pytest.raises(BadPrompts, match="also the id of prompt 0"):
        LabelledPrompts.from_lists(["a", "b"], [1, 2], id=["x", "x"])
