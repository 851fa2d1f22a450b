"""Text to token ids, alike for every tokenizer: Hugging Face fast or slow, or a bare ``tokenizers.Tokenizer``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mech_align.errors import BadPrompts


def text_ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Which tokens does the text become?"""
    encoded = tokenizer.encode(text, add_special_tokens=special)
    return [int(token) for token in getattr(encoded, "ids", encoded)]


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """How does the vocabulary spell these tokens, marks for spaces included ("▁She", "ĠShe")?"""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        found = tokenizer.convert_ids_to_tokens(list(ids))
    else:
        found = [tokenizer.id_to_token(token) for token in ids]
    return [piece.decode("utf-8", "replace") if isinstance(piece, bytes) else str(piece) for piece in found]


def piece_id(tokenizer: Any, piece: str) -> int | None:
    """Which token is spelled so in the vocabulary? None where there is none."""
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        found = tokenizer.convert_tokens_to_ids(piece)
    else:
        found = tokenizer.token_to_id(piece)
    # An unknown piece comes back as the unknown token; only a piece that is spelled the same is the one asked for.
    return int(found) if found is not None and pieces(tokenizer, [int(found)]) == [piece] else None


def spans(tokenizer: Any, text: str) -> list[tuple[int, int]] | None:
    """Which characters of the text does each token cover (no special tokens added)? None for slow tokenizers."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    elif hasattr(tokenizer, "id_to_token"):
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    else:
        return None
    return [(int(start), int(end)) for start, end in offsets]


def special_id(tokenizer: Any, role: str) -> int | None:
    """The id of the "bos" or "unk" token, where the tokenizer says that it has one."""
    found = getattr(tokenizer, f"{role}_token_id", None)
    return int(found) if isinstance(found, int) else None


@dataclass(frozen=True)
class PromptIds:
    """A prompt as tokens: what the model reads, and how it came about.

    Args:
        ids: All tokens.
        text: The text behind them, chat template applied.
        n_added: How many tokens before those of the text were added (the beginning-of-sequence token).
        notes: What was done that the user did not ask for, one line each.
    """

    ids: list[int]
    text: str
    n_added: int
    notes: tuple[str, ...]


def prompt_ids(
    tokenizer: Any, text: str, *, prepend_bos: bool | None, from_template: bool, template_start: int | None = None
) -> PromptIds:
    """Which tokens does the model read for this text?

    Special tokens before the text are those that the tokenizer adds by default, unless the text already brings its own.
    Those that it would add *after* the text (``</s>``, ``[SEP]``) are left out: the next token would follow the end.

    Args:
        text: The prompt, chat template applied.
        prepend_bos: True or False overrules the tokenizer's default.
        from_template: The text comes out of a chat template, which writes its own special tokens.
        template_start: The token that such a template begins with, to know a text that went through it before.
    """
    body = text_ids(tokenizer, text)
    if not body:
        raise BadPrompts("A prompt has no tokens.", why="The tokenizer drops every character of it.")
    bos = special_id(tokenizer, "bos")
    if prepend_bos and bos is None:
        raise BadPrompts(
            "prepend_bos=True, and the tokenizer has no beginning-of-sequence token.",
            hint="Leave out prepend_bos, or set tokenizer.bos_token.",
        )
    has_bos = bos is not None and body[0] == bos
    if prepend_bos is not None:
        if prepend_bos and has_bos:
            return PromptIds(body, text, 0, ("prompts already begin with the BOS text: no second BOS token added",))
        return PromptIds([bos, *body], text, 1, ()) if prepend_bos and bos is not None else PromptIds(body, text, 0, ())
    if from_template:
        return PromptIds(body, text, 0, ())
    added, trailing = _added_by_default(tokenizer, text, body)
    notes = ("the tokenizer's end token after the prompt was left out",) if trailing else ()
    if added and has_bos:
        return PromptIds(body, text, 0, ("prompts already begin with the BOS text: no second BOS token added", *notes))
    if added and body[0] == template_start:
        note = "prompts are already in the chat template, which writes no BOS token: none added"
        return PromptIds(body, text, 0, (note, *notes))
    return PromptIds([*added, *body], text, len(added), notes)


def _added_by_default(tokenizer: Any, text: str, body: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after the text."""
    whole = text_ids(tokenizer, text, special=True)
    extra = len(whole) - len(body)
    for before in range(extra + 1):
        if whole[before : before + len(body)] == body:
            return whole[:before], whole[before + len(body) :]
    raise BadPrompts(
        "The tokenizer splits a prompt differently with and without special tokens.",
        why=f"It makes {len(whole)} tokens with them and {len(body)} others without.",
        hint="Say prepend_bos=True or prepend_bos=False.",
    )


def template_start(tokenizer: Any) -> int | None:
    """The special token that the tokenizer's chat template begins with; None where it begins with text."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception:  # a template that wants more than one user turn tells us nothing here
        return None
    start = text_ids(tokenizer, str(text))[:1]
    specials = {*getattr(tokenizer, "all_special_ids", ()), *_added_token_ids(tokenizer)}
    return start[0] if start and start[0] in specials else None


def _added_token_ids(tokenizer: Any) -> list[int]:
    return [int(token) for token in getattr(tokenizer, "added_tokens_decoder", {})]
