"""Which token an answer means, for three kinds of tokenizer and two real ones."""

from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level, sentence_piece, words
from transformers import PreTrainedTokenizerFast

from mech_align.errors import BadAnswer
from mech_align.prompts import Pairs, answer_token, leading_space_alternative
from mech_align.prompts.tokenizing import pieces

PARK = "One day, Lily went to the park."


def spelled(tokenizer: object, prompt: str, answer: str) -> tuple[str, str]:
    one = answer_token(tokenizer, prompt, answer)
    return pieces(tokenizer, [one.token])[0], one.how


@pytest.mark.parametrize(("answer", "piece"), [(" She", "ĠShe"), ("She", "She"), (" was", "Ġwas")])
def test_byte_level_keeps_the_users_space(answer: str, piece: str) -> None:
    assert spelled(byte_level(), PARK, answer) == (piece, "in context")


def test_sentence_piece_reads_both_spellings_as_the_word() -> None:
    assert spelled(sentence_piece(), PARK, " She") == ("▁She", "in context")
    assert spelled(sentence_piece(), PARK, "She") == ("▁She", "alone")  # "park.She" would be "S", "he"


def test_sentence_piece_alone_does_not_take_the_lone_mark() -> None:
    # Where the prompt's own tokens change, " She" is asked for alone, and that is "▁", "▁She".
    one = answer_token(sentence_piece(), PARK, " She", before=[0])
    assert (pieces(sentence_piece(), [one.token])[0], one.how) == ("▁She", "alone")


def test_words_have_no_spaces() -> None:
    assert spelled(words(), PARK, " She") == spelled(words(), PARK, "She") == ("She", "in context")


def test_a_merge_with_the_prompt_falls_back_on_the_answer_alone() -> None:
    tokenizer = byte_level()
    one = answer_token(tokenizer, "One day, S", "he")  # "She" is one token: the prompt would change
    assert (pieces(tokenizer, [one.token])[0], one.how) == ("he", "alone")


def test_several_tokens_are_refused_with_the_split_and_what_is_near() -> None:
    tokenizer = byte_level()
    with pytest.raises(BadAnswer) as caught:
        answer_token(tokenizer, PARK, " SORRY", where="pair 3, `answer`")
    error = caught.value
    assert error.what == "pair 3, `answer`: the answer ' SORRY' is not one token."
    ids = tokenizer.encode(" SORRY")
    assert f"{len(ids)} tokens" in error.why
    assert all(f"({token})" in error.why for token in ids)
    sorry = tokenizer.convert_tokens_to_ids("ĠSorry")
    assert f"' Sorry' ({sorry})" in error.hints[0]
    assert "first-token" in error.hints[-1]


def test_the_first_token_is_taken_when_asked_for() -> None:
    one = answer_token(byte_level(), PARK, " Shelly", policy="first-token")
    assert (pieces(byte_level(), [one.token])[0], one.how) == ("ĠShe", "first token")
    piece = answer_token(sentence_piece(), PARK, "Shelly", policy="first-token")
    assert pieces(sentence_piece(), [piece.token])[0].startswith("▁S")


@pytest.mark.parametrize("tokenizer", [sentence_piece(), words()])
def test_an_unknown_answer_is_refused_under_every_policy(tokenizer: object) -> None:
    for policy in ("single", "first-token"):
        with pytest.raises(BadAnswer, match="does not know"):
            answer_token(tokenizer, PARK, "ß", policy=policy)


def test_digits_and_bars_get_their_own_hint() -> None:
    with pytest.raises(BadAnswer) as digits:
        answer_token(byte_level(), PARK, "47764")
    assert any("from_tokens" in hint for hint in digits.value.hints)
    with pytest.raises(BadAnswer) as bars:
        answer_token(byte_level(), PARK, " She| He")
    assert any('["a", "b"]' in hint for hint in bars.value.hints)


@pytest.mark.parametrize(
    ("tokenizer", "one", "other"),
    [(byte_level(), "She", "ĠShe"), (byte_level(), "Sorry", "ĠSorry"), (sentence_piece(), "▁S", "S")],
)
def test_leading_space_alternative_goes_both_ways(tokenizer: PreTrainedTokenizerFast, one: str, other: str) -> None:
    first, second = (tokenizer.convert_tokens_to_ids(piece) for piece in (one, other))
    assert leading_space_alternative(tokenizer, first) == second
    assert leading_space_alternative(tokenizer, second) == first


def test_leading_space_alternative_is_none_where_the_vocabulary_has_no_such_word() -> None:
    assert leading_space_alternative(words(), words().convert_tokens_to_ids("She")) is None
    mark = sentence_piece().convert_tokens_to_ids("▁")
    assert leading_space_alternative(sentence_piece(), mark) is None
    long = sentence_piece().convert_tokens_to_ids("▁Lily")
    assert leading_space_alternative(sentence_piece(), long) is None


def test_bare_tokenizers_work_as_well() -> None:
    inner = byte_level().backend_tokenizer
    one = answer_token(inner, PARK, " She")
    assert inner.id_to_token(one.token) == "ĠShe"
    assert leading_space_alternative(inner, one.token) == inner.token_to_id("She")
    encoded = Pairs.from_lists([PARK], ["One day, Tim went to the park."], [" She"], [" He"]).encode(inner)
    assert encoded.clean == [byte_level().encode(PARK)]


@pytest.mark.parametrize("space", ["", " "])
def test_real_story_model(data_dir: Path, space: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "stories260K-hf")
    pairs = Pairs.from_lists([PARK], ["One day, Tim went to the park."], [space + "She"], [space + "He"])
    encoded = pairs.encode(tokenizer)
    assert tokenizer.convert_ids_to_tokens([*encoded.answer[0], *encoded.wrong[0]]) == ["▁She", "▁He"]
    assert encoded.clean[0][0] == tokenizer.bos_token_id
    assert encoded.clean[0].count(tokenizer.bos_token_id) == 1


def test_real_character_model(data_dir: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "slm4096-hf")
    prompt = "Q: What is SLM?\nA:"
    assert pieces(tokenizer, [answer_token(tokenizer, prompt, " ").token]) == [" "]
    # "\n" is a character here and the unknown token too: written as itself it is an answer, standing for "Z" it is not.
    assert answer_token(tokenizer, prompt, "\n").token == tokenizer.unk_token_id
    with pytest.raises(BadAnswer, match="does not know"):
        answer_token(tokenizer, prompt, "Z")
    with pytest.raises(BadAnswer, match="3 tokens"):
        answer_token(tokenizer, prompt, "She")
