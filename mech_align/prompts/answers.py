"""Answers as sets of single tokens: which token is meant by " She", here, with this tokenizer?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mech_align.errors import BadAnswer
from mech_align.prompts.tokenizing import piece_id, pieces, special_id, text_ids

AnswerPolicy = Literal["single", "first-token"]
_SPACE_MARKS = ("▁", "Ġ")  # SentencePiece, byte-level BPE


@dataclass(frozen=True)
class AnswerToken:
    """The token meant by an answer, and how it was found.

    Args:
        token: Its id.
        how: "in context" (what the tokenizer writes after this prompt), "alone" (the answer by itself is one token), or
            "first token" (the first of several, because the user allowed it).
    """

    token: int
    how: Literal["in context", "alone", "first token"]


def answer_token(
    tokenizer: Any,
    prompt: str,
    answer: str,
    *,
    policy: AnswerPolicy = "single",
    where: str = "",
    before: Sequence[int] | None = None,
) -> AnswerToken:
    """Which single token is this answer, after this prompt?

    First the tokenizer is asked what it would write after the prompt: the answer must add exactly one token and change
    none before it. Where it would not (it splits "park.She" into "S" and "he"), the answer by itself must be one token
    ("▁She").

    Args:
        prompt: The text that the answer follows, chat template applied.
        policy: "first-token" takes the first token of a longer answer instead of raising.
        where: Which pair and field this is, for the message.
        before: The prompt's tokens without special ones, where the caller has them already.

    Raises:
        BadAnswer: It is several tokens, or none; shows the split and single tokens nearby.
    """
    in_context = _added(tokenizer, prompt, answer, text_ids(tokenizer, prompt) if before is None else list(before))
    if len(in_context) == 1 and not _unknown(tokenizer, in_context[0], answer):
        return AnswerToken(in_context[0], "in context")
    alone = [split for split in _alone(tokenizer, answer) if not any(_unknown(tokenizer, t, answer) for t in split)]
    for split in alone:
        if len(split) == 1:
            return AnswerToken(split[0], "alone")
    known = [in_context] if not any(_unknown(tokenizer, t, answer) for t in in_context) else []
    splits = [split for split in (*known, *alone) if split]
    if policy == "first-token" and splits:
        # The shorter split is the likelier spelling: "▁She" + "lly" rather than "S" + "he" + "lly".
        return AnswerToken(min(splits, key=len)[0], "first token")
    raise _not_one_token(tokenizer, prompt, answer, splits, where)


def leading_space_alternative(tokenizer: Any, answer_id: int) -> int | None:
    """Which token is the same word with the other leading space: " Sorry" for "Sorry", "Sorry" for " Sorry"?

    A model nearly always writes one of the two and never the other; comparing their probabilities shows an answer that
    was written with the wrong one.

    Returns:
        The other token's id; None where the vocabulary has none.
    """
    piece = pieces(tokenizer, [answer_id])[0]
    for mark in (*_SPACE_MARKS, " "):
        if piece.startswith(mark):
            return piece_id(tokenizer, piece[len(mark) :]) if len(piece) > len(mark) else None
    for mark in (*_SPACE_MARKS, " "):
        if (found := piece_id(tokenizer, mark + piece)) is not None:
            return found
    return None


def _added(tokenizer: Any, prompt: str, answer: str, before: list[int]) -> list[int]:
    """The tokens that the answer adds to the prompt; empty where it changes the prompt's own."""
    after = text_ids(tokenizer, prompt + answer)
    return after[len(before) :] if after[: len(before)] == before else []


def _alone(tokenizer: Any, answer: str) -> list[list[int]]:
    """The answer by itself, as it stands; and, where words begin with a space mark anyway, without its own space."""
    splits = [text_ids(tokenizer, answer)]
    bare = answer[1:]
    if answer.startswith(" ") and bare and not bare[0].isspace():
        without = text_ids(tokenizer, bare)
        if without and pieces(tokenizer, without[:1])[0].startswith(_SPACE_MARKS):
            # "▁She" is what SentencePiece means by " She"; asked for " She" alone it writes "▁", "▁She".
            splits.insert(0, without)
    return [split for split in splits if split]


def _unknown(tokenizer: Any, token: int, answer: str) -> bool:
    """Is this the unknown token, and not because the answer is spelled so?"""
    return token == special_id(tokenizer, "unk") and pieces(tokenizer, [token])[0] != answer


def _not_one_token(tokenizer: Any, prompt: str, answer: str, splits: list[list[int]], where: str) -> BadAnswer:
    what = f"{where + ': ' if where else ''}the answer {answer!r} is not one token."
    near = _single_tokens_near(tokenizer, prompt, answer)
    hints = [f"Write one that is a single token: {', '.join(near)}."] if near else []
    if not splits:
        return BadAnswer(what, why="The tokenizer does not know its characters.", hint=hints or ["Use another answer."])
    split = min(splits, key=len)
    shown = " + ".join(f"{piece!r} ({token})" for piece, token in zip(pieces(tokenizer, split), split, strict=True))
    if "|" in answer or answer.startswith("["):
        hints.append('It looks like several answers in one text: write a list, ["a", "b"].')
    if answer.strip().isdigit():
        hints.append("If the number is a token id, use Pairs.from_tokens(...), which takes ids.")
    first = pieces(tokenizer, split[:1])[0]
    how = '--answers first-token, or encode(..., answers="first-token")'
    hints.append(f"Or compare by the first token alone ({first!r}): {how}.")
    return BadAnswer(what, why=f"It is {len(split)} tokens: {shown}.", hint=hints)


def _single_tokens_near(tokenizer: Any, prompt: str, answer: str) -> list[str]:
    word = answer.strip()
    if not word:
        return []
    spellings = [word, word.capitalize(), word.lower(), word.upper()]
    candidates = [space + spelling for spelling in dict.fromkeys(spellings) for space in (" ", "")]
    found: dict[int, str] = {}
    before = text_ids(tokenizer, prompt)
    for candidate in candidates:
        if candidate == answer:
            continue
        for split in (_added(tokenizer, prompt, candidate, before), *_alone(tokenizer, candidate)):
            if len(split) == 1 and not _unknown(tokenizer, split[0], candidate):
                found.setdefault(split[0], f"{candidate!r} ({split[0]})")
                break
    return list(found.values())


def overlap(tokenizer: Any | None, answer: Sequence[int], wrong: Sequence[int], where: str) -> BadAnswer | None:
    """The error for a token that stands on both sides, which no metric can tell apart; None where there is none."""
    shared = sorted(set(answer) & set(wrong))
    if not shared:
        return None
    spelled = [""] * len(shared) if tokenizer is None else [f"{piece!r} " for piece in pieces(tokenizer, shared)]
    names = [f"{piece}({token})" for piece, token in zip(spelled, shared, strict=True)]
    return BadAnswer(
        f"{where}: `answer` and `wrong` share the token {', '.join(names)}.",
        why="A metric compares the two sets: a token on both sides cancels out.",
        hint="Take it out of one of them. Spellings with and without a leading space can be the same token.",
    )
