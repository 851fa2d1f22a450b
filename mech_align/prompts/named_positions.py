"""Where the user's named positions are: which tokens of each prompt hold " Lily"?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mech_align.errors import BadPrompts
from mech_align.prompts.cells import PositionValue
from mech_align.prompts.chat import Prompt
from mech_align.prompts.tokenizing import PromptIds, spans

if TYPE_CHECKING:
    from mech_align.prompts.pairs import Pairs

_SIDES = ("clean", "corrupt")


def positions_in_text(
    pairs: "Pairs", row: int, tokenizer: Any, clean: PromptIds, corrupt: PromptIds
) -> dict[str, tuple[list[int], list[int]]]:
    """The user's named positions of one pair: tokens on the clean and on the corrupt side."""
    pair = pairs.id[row]
    found: dict[str, tuple[list[int], list[int]]] = {}
    for name, value in pairs.positions[row].items():
        both: list[list[int]] = []
        for side, (prompt, encoded) in enumerate(
            (((pairs.clean or ())[row], clean), ((pairs.corrupt or ())[row], corrupt)),
        ):
            one = value[side] if isinstance(value, tuple) else value
            if isinstance(one, int):
                both.append(position_index(one, encoded.ids, pair, name, side))
            else:
                both.append(_substring(tokenizer, one, prompt, encoded, f"`{_SIDES[side]}` of {pair}", name))
        found[name] = (both[0], both[1])
    return found


def position_index(value: PositionValue, tokens: Sequence[int], pair: str, name: str, side: int) -> list[int]:
    """The token that an index of the user means on one side (0 clean, 1 corrupt).

    Raises:
        BadPrompts: It is a text, or outside the prompt.
    """
    index = value[side] if isinstance(value, tuple) else value
    if not isinstance(index, int):
        raise BadPrompts(
            f"The position {name!r} of {pair} is the text {index!r}, and this pair is made of tokens.",
            hint="Give token indices: {'subject': 3}, or {'subject': [3, 4]} for clean and corrupt.",
        )
    if not -len(tokens) <= index < len(tokens):
        raise BadPrompts(
            f"The position {name!r} of {pair} is {index}, and its {_SIDES[side]} prompt has {len(tokens)} tokens.",
            hint="Indices count all tokens from 0, special ones included; negative ones count from the end.",
        )
    return [index % len(tokens)]


def _substring(tokenizer: Any, wanted: str, prompt: Prompt, encoded: PromptIds, where: str, name: str) -> list[int]:
    """Which tokens hold this part of the prompt?"""
    text, inside = encoded.text, prompt if isinstance(prompt, str) else encoded.text
    count = sum(inside.startswith(wanted, i) for i in range(len(inside)))
    if count != 1:
        raise BadPrompts(
            f"The position {name!r}: {wanted!r} stands {'nowhere' if not count else f'{count} times'} in {where}.",
            why="A named position must be found exactly once in each prompt.",
            hint=[
                f'Name the clean and the corrupt text apart: {{"{name}": ["Lily", "Tim"]}}.'
                if not count
                else "Give more of the text around it, or a token index.",
            ],
        )
    # Templates trim a prompt, and its turn is the last place where it stands: a system prompt before may quote it.
    core = inside.strip() if wanted in inside.strip() else inside
    if core not in text:
        raise BadPrompts(
            f"The position {name!r} of {where} cannot be found: the chat template rewrites the prompt.",
            hint="Give a token index instead of a text.",
        )
    start = text.rfind(core) + core.find(wanted)
    covered = spans(tokenizer, text)
    if covered is None:
        raise BadPrompts(
            f"The position {name!r} is a text, and this tokenizer cannot say which characters a token covers.",
            hint="Load the fast tokenizer (use_fast=True), or give a token index.",
        )
    end = start + len(wanted)
    tokens = [i + encoded.n_added for i, (a, b) in enumerate(covered) if max(a, start) < min(b, end)]
    if not tokens:
        raise BadPrompts(f"The position {name!r}: no token covers {wanted!r} in {where}.", hint="Give a token index.")
    return tokens
