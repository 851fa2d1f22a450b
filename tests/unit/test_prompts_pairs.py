"""Pairs as tokens: special tokens, ragged lengths, named positions, chat templates, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_for_tests import CHAT, byte_level, sentence_piece, words

from mech_align.errors import BadAnswer, BadPrompts
from mech_align.prompts import ChatTemplate, LabelledPrompts, Pairs
from mech_align.prompts.encoding import check_policy

LILY, TIM = "One day, Lily went to the park.", "One day, Tim went to the park."
LONG = "One day, Lily Tim Lily went to the park."


def park(**changes: Any) -> Pairs:
    return Pairs.from_lists(**{"clean": [LILY], "corrupt": [TIM], "answer": [" She"], "wrong": [" He"], **changes})


def test_encoding_in_full() -> None:
    tokenizer = byte_level()
    pairs = Pairs.from_lists([LILY, LILY], [TIM, LONG], [" She", [" She", "She"]], [" He", " He"], group=["a", "b"])
    encoded = pairs.encode(tokenizer)
    she, bare, he = tokenizer.convert_tokens_to_ids(["ĠShe", "She", "ĠHe"])
    assert encoded.clean == [tokenizer.encode(LILY)] * 2
    assert encoded.corrupt == [tokenizer.encode(TIM), tokenizer.encode(LONG)]
    assert (encoded.answer, encoded.wrong) == ([(she,), (she, bare)], [(he,), (he,)])
    assert (encoded.group, encoded.id) == (("a", "b"), ("0", "1"))
    assert encoded.source_position[0].tolist() == list(range(9))
    # One day , Lily | Tim Lily | went to the park .
    assert encoded.source_position[1].tolist() == [0, 1, 2, 3, -1, -1, 4, 5, 6, 7, 8]
    assert encoded.named[0]["differs"] == encoded.named[0]["first_difference"] == [3]
    assert encoded.named[1]["differs"] == [4, 5]
    assert encoded.named_clean[1]["last"] == [8]
    assert "1 of 2 pairs differ in length: 2 corrupt positions have no partner and stay corrupt" in encoded.notes


def test_ragged_policies() -> None:
    pairs = Pairs.from_lists([LILY, LILY], [TIM, LONG], [" She"] * 2, [" He"] * 2, id=["even", "odd"])
    dropped = pairs.encode(byte_level(), ragged="drop")
    assert dropped.id == ("even",)
    assert any(
        "1 of 2 pairs differ in length and were dropped: odd (9 and 11 tokens)" in note for note in dropped.notes
    )
    with pytest.raises(BadPrompts, match=r"1 of 2 pairs differ in length: odd \(9 and 11 tokens\)"):
        pairs.encode(byte_level(), ragged="error")
    with pytest.raises(BadPrompts, match="leaves no pair"):
        pairs[1:].encode(byte_level(), ragged="drop")
    with pytest.raises(BadPrompts, match="ragged='pad' is not known"):
        check_policy("ragged", "pad", ("align", "drop", "error"))


def test_bos_is_the_tokenizers_unless_overruled() -> None:
    plain, adding = byte_level(), byte_level(adds_bos=True)
    bos, body = 0, plain.encode(LILY)
    assert park().encode(plain).clean == [body]
    assert park().encode(adding).clean == [[bos, *body]]
    assert park().encode(adding).settings["added_before_prompt"] == ["<|endoftext|>"]
    assert park().encode(plain, prepend_bos=True).clean == [[bos, *body]]
    assert park().encode(adding, prepend_bos=False).clean == [body]
    assert park().encode(sentence_piece()).clean == [sentence_piece().encode(LILY)]
    with pytest.raises(BadPrompts, match="no beginning-of-sequence token"):
        park().encode(words(), prepend_bos=True)


@pytest.mark.parametrize("prepend_bos", [None, True])
def test_no_second_bos(prepend_bos: bool | None) -> None:
    tokenizer = byte_level(adds_bos=True)
    pairs = park(clean=["<|endoftext|>" + LILY], corrupt=["<|endoftext|>" + TIM])
    encoded = pairs.encode(tokenizer, prepend_bos=prepend_bos)
    assert encoded.clean == [[0, *byte_level().encode(LILY)]]
    assert any("no second BOS" in note for note in encoded.notes)


def test_an_end_token_after_the_prompt_is_left_out() -> None:
    encoded = park().encode(byte_level(ends=True, adds_bos=True))
    assert encoded.clean == [[0, *byte_level().encode(LILY)]]
    assert any("end token" in note for note in encoded.notes)


def test_text_that_went_through_a_template_without_bos_gets_none() -> None:
    template = CHAT.removeprefix("{{ bos_token }}")
    tokenizer = byte_level(adds_bos=True, chat=template)
    ready = "<|user|>{}<|end|><|assistant|>"
    pairs = park(clean=[ready.format(LILY)], corrupt=[ready.format(TIM)], answer=["Sure"], wrong=["Sorry"])
    encoded = pairs.encode(tokenizer)
    assert encoded.clean[0][0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert any("already in the chat template" in note for note in encoded.notes)
    assert park().encode(tokenizer).clean[0][0] == 0
    through = park(answer=["Sure"], wrong=["Sorry"]).with_chat(ChatTemplate()).encode(tokenizer)
    assert through.clean == encoded.clean
    assert any("writes no BOS token" in note for note in through.notes)


def test_chat_template() -> None:
    tokenizer = byte_level(adds_bos=True, chat=CHAT)
    chat = ChatTemplate(system="I cannot", prefill="Sure,")
    pairs = park(answer=[" Yes"], wrong=[" No"]).with_chat(chat)
    encoded = pairs.encode(tokenizer)
    expected = f"<|endoftext|><|system|>I cannot<|end|><|user|>{LILY}<|end|><|assistant|>Sure,"
    assert tokenizer.decode(encoded.clean[0]) == expected
    assert encoded.clean[0].count(0) == 1
    assert encoded.settings["chat_template"] == chat.describe()
    assert chat.describe() in encoded.notes
    assert "I cannot" not in chat.describe()
    assert "system prompt of 2 words" in chat.describe()
    assert pairs.fingerprint != park(answer=[" Yes"], wrong=[" No"]).fingerprint
    own = ChatTemplate(template="{% for m in messages %}{{ m.content }}!{% endfor %}{{ tail }}", options={"tail": "?"})
    got = park(answer=["Yes"], wrong=["No"]).with_chat(own).encode(tokenizer)
    assert tokenizer.decode(got.clean[0]) == LILY + "!?"


def test_messages() -> None:
    tokenizer = byte_level(adds_bos=True, chat=CHAT)
    turns = [{"role": "user", "content": "Lily"}, ("assistant", "Yes"), ("user", "Tim")]
    pairs = park(clean=[turns], corrupt=["He"], answer=["Sure"], wrong=["Sorry"])
    with pytest.raises(BadPrompts, match="list of messages, and no chat template"):
        pairs.encode(tokenizer)
    encoded = pairs.with_chat(ChatTemplate()).encode(tokenizer)
    text = "<|endoftext|><|user|>Lily<|end|><|assistant|>Yes<|end|><|user|>Tim<|end|><|assistant|>"
    assert tokenizer.decode(encoded.clean[0]) == text
    begun = park(clean=[[*turns, ("assistant", "I")]], answer=[" was"], wrong=[" cannot"]).with_chat(ChatTemplate())
    assert tokenizer.decode(begun.encode(tokenizer).clean[0]) == text + "I"
    with pytest.raises(BadPrompts, match="prefill as well"):
        begun.with_chat(ChatTemplate(prefill="Sure")).encode(tokenizer)
    with pytest.raises(BadPrompts, match="Two system prompts"):
        park(clean=[[("system", "x"), ("user", "y")]]).with_chat(ChatTemplate(system="z")).encode(tokenizer)


def test_chat_errors_are_readable() -> None:
    with pytest.raises(BadPrompts, match="has no chat template"):
        park().with_chat(ChatTemplate()).encode(byte_level())
    strict = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(BadPrompts) as caught:
        park().with_chat(ChatTemplate(system="x", template=strict)).encode(byte_level())
    assert "System role not supported" in caught.value.why
    assert any("Gemma" in hint for hint in caught.value.hints)
    with pytest.raises(BadPrompts, match="prefill but without"):
        ChatTemplate(prefill="x", add_generation_prompt=False)
    with pytest.raises(BadPrompts, match="made of tokens"):
        Pairs.from_tokens([[1]], [[2]], [3], [4]).with_chat(ChatTemplate())
    with pytest.raises(BadPrompts, match="no tokenizer"):
        park().encode(None)


@pytest.mark.parametrize(
    ("value", "clean", "corrupt"),
    [
        (["Lily", "Tim"], [3], [3]),
        ("went to", [4, 5], [4, 5]),
        ("park", [7], [7]),
        (-2, [7], [7]),
        ([3, "Tim"], [3], [3]),
        ([2, 3], [2], [3]),
    ],
)
def test_named_positions(value: Any, clean: list[int], corrupt: list[int]) -> None:
    encoded = park(positions=[{"here": value}]).encode(byte_level())
    assert (encoded.named_clean[0]["here"], encoded.named[0]["here"]) == (clean, corrupt)
    assert encoded.source_position[0][corrupt].tolist() == clean
    shifted = park(positions=[{"here": value}]).encode(byte_level(adds_bos=True))
    if isinstance(value, str):  # indices count the BOS token, text moves with it
        assert shifted.positions("here") == [[i + 1 for i in corrupt]]
    elif value == -2:
        assert shifted.positions("here") == [[8]]


def test_named_positions_pair_the_middle_of_ragged_prompts() -> None:
    corrupt = "One day, She was Tim went to the park."
    pairs = park(corrupt=[corrupt], positions=[{"who": ["Lily", "Tim"]}])
    without = park(corrupt=[corrupt]).encode(byte_level()).source_position[0]
    assert without[5] == -1
    encoded = pairs.encode(byte_level())
    assert encoded.source_position[0].tolist() == [0, 1, 2, -1, -1, 3, 4, 5, 6, 7, 8]
    assert encoded.swapped().source_position[0][3] == 5
    uneven = park(corrupt=[corrupt], positions=[{"who": ["Lily", "was Tim"]}]).encode(byte_level())
    assert uneven.source_position[0].tolist() == without.tolist()
    assert any("'who' covers unequal numbers" in note for note in uneven.notes)


def test_named_positions_in_chats_are_looked_for_in_the_prompt() -> None:
    tokenizer = byte_level(adds_bos=True, chat=CHAT)
    chat = ChatTemplate(system=f"Lily and Tim, {LILY} {TIM}")
    pairs = park(answer=["Yes"], wrong=["No"], positions=[{"who": ["Lily", "Tim"], "park": "park"}])
    pairs = dataclasses.replace(pairs, clean=(f" {LILY}",))  # which the template trims
    encoded = pairs.with_chat(chat).encode(tokenizer)
    for ids, names, word in (
        (encoded.clean[0], encoded.named_clean[0], "Lily"),
        (encoded.corrupt[0], encoded.named[0], "Tim"),
    ):
        assert [tokenizer.decode(ids[i]) for i in names["who"]] == [f" {word}"]
        assert names["who"][0] > ids.index(tokenizer.convert_tokens_to_ids("<|user|>"))
        assert [tokenizer.decode(ids[i]) for i in names["park"]] == [" park"]


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece(), words()])
def test_named_positions_with_every_tokenizer(tokenizer: Any) -> None:
    encoded = park(positions=[{"who": ["Lily", "Tim"]}]).encode(tokenizer)
    assert [tokenizer.decode(encoded.clean[0][i]).strip() for i in encoded.named_clean[0]["who"]] == ["Lily"]
    assert [tokenizer.decode(encoded.corrupt[0][i]).strip() for i in encoded.named[0]["who"]] == ["Tim"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Lily", r"'Lily' stands nowhere in `corrupt` of 0"),
        (["a", "Tim"], "'a' stands 2 times in `clean` of 0"),
        (40, "is 40, and its clean prompt has 9 tokens"),
        (-10, "is -10"),
    ],
)
def test_named_positions_that_cannot_be_found(value: Any, message: str) -> None:
    with pytest.raises(BadPrompts, match=message):
        park(positions=[{"here": value}]).encode(byte_level())


def test_asking_for_an_unknown_name_lists_those_there_are() -> None:
    pairs = Pairs.from_lists([LILY] * 2, [TIM] * 2, [" She"] * 2, [" He"] * 2, positions=[{"subject": 3}, None])
    encoded = pairs.encode(byte_level())
    assert any("'subject' is given in 1 of 2 pairs" in note for note in encoded.notes)
    with pytest.raises(BadPrompts, match="1 of 2 pairs have no position named 'subject': 1"):
        encoded.positions("subject")
    with pytest.raises(BadPrompts) as caught:
        encoded.positions("sujbect")
    assert "Did you mean 'subject'?" in caught.value.hints


def test_answers_that_are_not_apart() -> None:
    with pytest.raises(BadPrompts, match="is in `answer` too"):
        park(answer=[[" He", " She"]])
    with pytest.raises(BadAnswer, match=r"pair 0: `answer` and `wrong` share the token '▁She'"):
        park(answer=[" She"], wrong=["She"]).encode(sentence_piece())
    assert park(answer=[" She"], wrong=["She"]).encode(byte_level()).answer  # two tokens there
    with pytest.raises(BadAnswer, match=r"share the token \(3\)"):
        Pairs.from_tokens([[1]], [[2]], [[3, 4]], [[5, 3]])


def test_failing_answers_are_counted() -> None:
    pairs = Pairs.from_lists([LILY] * 3, [TIM] * 3, [" zebra", " zebra", " She"], [" He", " Herself", " He"])
    with pytest.raises(BadAnswer) as caught:
        pairs.encode(byte_level())
    assert caught.value.what.startswith("pair 0, `answer`: the answer ' zebra'")
    assert "In all 3 answers fail so: ' zebra', ' Herself'" in caught.value.why
    encoded = pairs.encode(byte_level(), answers="first-token")
    assert any(note.startswith("3 answers of several tokens stand for their first one") for note in encoded.notes)
    assert encoded.settings["answers"] == "first-token"


def test_notes_on_what_may_mislead() -> None:
    same = park(corrupt=[LILY]).encode(byte_level())
    assert "1 of 1 pairs have the same clean and corrupt tokens: 0" in same.notes
    assert same.named[0]["first_difference"] == same.named[0]["differs"] == []
    shorter = park(corrupt=["One day, went to the park."]).encode(byte_level())
    assert any('"differs" is empty' in note for note in shorter.notes)
    assert any("end with a space" in note for note in park(clean=[LILY + " "]).encode(byte_level()).notes)
    assert any("does not know ('[UNK]')" in note for note in park(clean=["One zebra"]).encode(words()).notes)
    assert not any("does not know" in note for note in park().encode(words()).notes)
    assert any("were read alone: 'She' as '▁She'" in n for n in park(answer=["She"]).encode(sentence_piece()).notes)


def test_too_long_prompts_are_named() -> None:
    pairs = Pairs.from_lists([LILY, LONG], [TIM, TIM], [" She"] * 2, [" He"] * 2, id=["short", "long"])
    assert len(pairs.encode(byte_level(), n_ctx=11)) == 2
    with pytest.raises(BadPrompts, match="1 prompts are longer than the model's context of 10") as caught:
        pairs.encode(byte_level(), n_ctx=10)
    assert caught.value.why == "long has 11"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_tokens_in_place_of_text(kind: Any) -> None:
    pairs = Pairs.from_tokens(
        kind([[1, 2, 3], [1, 2, 4]]), kind([[1, 5, 3], [1, 6, 4]]), kind([7, 8]), kind([[9, 10], [11, 12]]), ["a", "b"]
    )
    encoded = pairs.encode(None)
    assert (encoded.clean, encoded.corrupt) == ([[1, 2, 3], [1, 2, 4]], [[1, 5, 3], [1, 6, 4]])
    assert (encoded.answer, encoded.wrong) == ([(7,), (8,)], [(9, 10), (11, 12)])
    assert encoded.named[0]["differs"] == [1]
    assert all(isinstance(token, int) for token in encoded.clean[0])


def test_tokens_that_are_none() -> None:
    with pytest.raises(BadPrompts) as caught:
        Pairs.from_tokens([[1.5], [1], []], [[2], ["x"], [2]], [3, -1, 3], [4, 4, 4])
    assert "4" not in caught.value.what
    assert "3 of 3 pairs" in caught.value.what
    assert "pair 0, field `clean`: found the number 1.5" in caught.value.why
    with pytest.raises(BadPrompts, match="The lists differ in length: clean 1, corrupt 2"):
        Pairs.from_tokens([[1]], [[2], [3]], [3], [4])
    ragged = Pairs.from_tokens([[1, 2, 3]], [[1, 3]], [4], [5], positions=[{"x": [1, 0]}]).encode(None)
    assert ragged.named[0]["x"] == [0]
    with pytest.raises(BadPrompts, match="is the text 'a'"):
        Pairs.from_tokens([[1]], [[2]], [3], [4], positions=[{"x": "a"}]).encode(None)


@pytest.mark.parametrize("bad", [3, None, "", "  ", [], [{"role": "user"}], b"x"])
def test_prompts_of_other_types(bad: Any) -> None:
    with pytest.raises(BadPrompts, match="pair 0, field `clean`: found"):
        park(clean=[bad])


def test_lists_are_checked() -> None:
    with pytest.raises(BadPrompts, match="The lists differ in length: clean 1, corrupt 1, answer 2, wrong 1"):
        park(answer=["a", "b"])
    with pytest.raises(BadPrompts, match="`clean` is one str"):
        park(clean=LILY)
    with pytest.raises(BadPrompts, match="at least one pair"):
        Pairs.from_lists([], [], [], [])
    with pytest.raises(BadPrompts, match="pair 1, field `id`: 'a' is also the id of pair 0"):
        Pairs.from_lists(["a", "b"], ["c", "d"], ["e"] * 2, ["f"] * 2, id=["a", "a"])
    with pytest.raises(BadPrompts, match="differ in number: group 2"):
        dataclasses.replace(park(), group=("a", "b"))


def test_taking_slicing_and_swapping() -> None:
    pairs = Pairs.from_lists(
        list("abcd"), list("efgh"), ["x"] * 4, ["y"] * 4, group=list("ggkk"), positions=[{"p": ["a", "e"]}] + [None] * 3
    )
    assert pairs[1:3].clean == ("b", "c")
    assert pairs[-1].id == ("3",)
    assert [len(pair) for pair in pairs] == [1] * 4  # type: ignore[reportUnknownArgumentType]
    assert pairs.take([3, 0]).group == ("k", "g")
    assert pairs.swapped().clean == pairs.corrupt
    assert pairs.swapped().wrong == pairs.answer
    assert pairs.swapped().positions[0] == {"p": ("e", "a")}
    assert pairs.swapped().swapped() == pairs
    assert pairs.swapped().fingerprint != pairs.fingerprint
    with pytest.raises(BadPrompts, match="No pair is left"):
        pairs[4:]
    encoded = park(corrupt=[LONG], positions=[{"who": ["Lily", "Tim"]}])
    there, back = encoded.encode(byte_level()).swapped(), encoded.swapped().encode(byte_level())
    assert (there.clean, there.answer, there.named) == (back.clean, back.answer, back.named)
    assert there.source_position[0].tolist() == back.source_position[0].tolist()


def test_fingerprints_know_content_only() -> None:
    assert park().fingerprint == park().fingerprint
    assert len(park().fingerprint) == 16
    changed = [
        park(clean=[LILY + " "]),
        park(answer=["She"]),
        park(wrong=[[" He", "He"]]),
        park(group=["g"]),
        park(positions=[{"p": 1}]),
        park().with_chat(ChatTemplate()),
        park().with_chat(ChatTemplate(system="x")),
    ]
    assert len({pairs.fingerprint for pairs in [park(), *changed]}) == 8


def test_repr_never_shows_a_prompt() -> None:
    for shown in (repr(park()), repr(park().encode(byte_level())), park().describe(), str(park())):
        assert "Lily" not in shown
        assert "park" not in shown
    assert repr(park()).startswith("Pairs(n=1, groups=1, clean~7 words, corrupt~7 words, fingerprint=")
    assert "clean~2 tokens" in repr(Pairs.from_tokens([[1, 2]], [[3, 4]], [5], [6]))
    assert "Lily" not in repr(LabelledPrompts.from_lists([LILY], ["x"]))


def test_groups_are_asked_for() -> None:
    assert any("no groups given" in note for note in park().notes)
    assert not any("no groups" in note for note in park(group=["g"]).notes)
