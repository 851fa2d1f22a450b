"""Prompts in, tokens out: contrast pairs, labelled prompts, chat templates, and the alignment of clean and corrupt."""

from mech_align.prompts.alignment import align
from mech_align.prompts.answers import AnswerToken, answer_token, leading_space_alternative
from mech_align.prompts.chat import ChatTemplate, Prompt
from mech_align.prompts.labelled import LabelledPrompts
from mech_align.prompts.loading import load_pairs, load_prompts
from mech_align.prompts.pairs import Pairs
from mech_align.prompts.token_pairs import TokenPairs

__all__ = [
    "AnswerToken",
    "ChatTemplate",
    "LabelledPrompts",
    "Pairs",
    "Prompt",
    "TokenPairs",
    "align",
    "answer_token",
    "leading_space_alternative",
    "load_pairs",
    "load_prompts",
]
