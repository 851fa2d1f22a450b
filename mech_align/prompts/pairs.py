"""Contrast pairs: two prompts, and the next tokens that tell them apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mech_align.errors import BadPrompts
from mech_align.prompts.answers import AnswerPolicy, overlap
from mech_align.prompts.cells import (
    Answers,
    PositionValue,
    Tokens,
    label,
    listed,
    no_groups,
    pair_columns,
    read_positions,
    token_row,
)
from mech_align.prompts.chat import ChatTemplate, Prompt, prompt_text
from mech_align.prompts.encoding import RaggedPolicy, encode_pairs
from mech_align.prompts.problems import Problem, fingerprint_of, plain, raise_problems
from mech_align.prompts.token_pairs import TokenPairs


@dataclass(frozen=True, repr=False)
class Pairs:
    """Clean and corrupt prompts with their right next tokens.

    Build them with :meth:`from_lists`, :meth:`from_tokens` or :func:`mech_align.prompts.load_pairs`.

    Args:
        clean: Prompts after which ``answer`` is right; None when made of tokens.
        corrupt: Prompts after which ``wrong`` is right; None when made of tokens.
        answer: For each pair the texts of the set of right answers; empty when made of tokens.
        wrong: Likewise for the corrupt prompts.
        group: The unit of resampling of each pair (template, behaviour, question).
        id: The name of each pair, each once.
        positions: For each pair its named positions.
        clean_tokens: Token ids in place of ``clean``; so are the next three.
        chat: The chat template that turns prompts into chats when they are encoded.
        notes: What was noticed while reading.
        source: Where the pairs come from.
    """

    clean: tuple[Prompt, ...] | None
    corrupt: tuple[Prompt, ...] | None
    answer: tuple[Answers, ...]
    wrong: tuple[Answers, ...]
    group: tuple[str, ...]
    id: tuple[str, ...]
    positions: tuple[Mapping[str, PositionValue], ...]
    clean_tokens: tuple[Tokens, ...] | None = None
    corrupt_tokens: tuple[Tokens, ...] | None = None
    answer_tokens: tuple[Tokens, ...] | None = None
    wrong_tokens: tuple[Tokens, ...] | None = None
    chat: ChatTemplate | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="pairs", compare=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise BadPrompts(f"{self.source} has no pairs.", hint="Give at least one pair of prompts.")
        lengths = {name: len(value) for name, value in self._columns().items()}
        wrong = [f"{name} {length}" for name, length in lengths.items() if length != len(self.id)]
        if wrong:
            raise BadPrompts(
                f"The parts of the pairs differ in number: {', '.join(wrong)}, and id {len(self.id)}.",
                hint="Give one entry a pair in each of them.",
            )
        seen: dict[str, int] = {}
        problems = [
            Problem(f"pair {row}", "id", f"{name!r} is also the id of pair {first}", "write another")
            for row, name in enumerate(self.id)
            if (first := seen.setdefault(name, row)) != row
        ]
        raise_problems(self.source, problems, len(self.id), "pairs")

    @classmethod
    def from_lists(
        cls,
        clean: Iterable[Any],
        corrupt: Iterable[Any],
        answer: Iterable[Any],
        wrong: Iterable[Any],
        group: Iterable[Any] | None = None,
        id: Iterable[Any] | None = None,
        positions: Iterable[Mapping[str, Any] | None] | None = None,
    ) -> "Pairs":
        """Pairs from lists of equal length.

        Args:
            clean: Texts, or lists of messages (``{"role": ..., "content": ...}``).
            corrupt: Likewise.
            answer: The right next token(s) after each clean prompt: a text or a list of texts.
            wrong: Likewise after each corrupt prompt.
            group: The unit of resampling; left out, every pair is its own.
            id: Names; left out, they are counted from 0.
            positions: Named positions: ``{"subject": "Lily"}``, ``{"subject": ["Lily", "Tim"]}`` for clean and corrupt,
                or token indices.

        Raises:
            BadPrompts: Lists of unequal length, or entries that cannot be used; says which.
        """
        given = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}
        given |= {
            name: value
            for name, value in {"group": group, "id": id, "positions": positions}.items()
            if value is not None
        }
        columns = {name: listed(name, value) for name, value in given.items()}
        if len({len(column) for column in columns.values()}) != 1:
            said = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise BadPrompts(f"The lists differ in length: {said}.", hint="Give one entry a pair in each of them.")
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        return cls(**pair_columns(rows, [f"pair {i}" for i in range(len(rows))], source="the lists", unit="pairs"))

    @classmethod
    def from_tokens(
        cls,
        clean: Iterable[Any],
        corrupt: Iterable[Any],
        answer: Iterable[Any],
        wrong: Iterable[Any],
        group: Iterable[Any] | None = None,
        id: Iterable[Any] | None = None,
        positions: Iterable[Mapping[str, Any] | None] | None = None,
    ) -> "Pairs":
        """Pairs from token ids, for models without a tokenizer. Lists, arrays or tensors; nothing is added to them.

        Args:
            clean: Token ids of each prompt, unpadded: a list of lists where lengths differ.
            corrupt: Likewise.
            answer: The right next token id(s) of each pair.
            wrong: Likewise after the corrupt prompt.
            group: The unit of resampling; left out, every pair is its own.
            id: Names; left out, they are counted from 0.
            positions: Named positions as token indices: ``{"subject": 3}`` or ``{"subject": [3, 4]}``.

        Raises:
            BadPrompts: Entries that are no token ids, or lists of unequal length.
        """
        problems: list[Problem] = []
        columns: dict[str, list[Tokens]] = {}
        for name, value in {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}.items():
            rows = listed(name, value)
            columns[name] = [token_row(name, row, f"pair {i}", problems) for i, row in enumerate(rows)]
        n = len(columns["clean"])
        if any(len(column) != n for column in columns.values()):
            said = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise BadPrompts(f"The lists differ in length: {said}.", hint="Give one entry a pair in each of them.")
        held = [read_positions(value, f"pair {i}", problems) for i, value in enumerate(positions or [None] * n)]
        raise_problems("the tokens", problems, n, "pairs")
        for i in range(n):
            if (shared := overlap(None, columns["answer"][i], columns["wrong"][i], f"pair {i}")) is not None:
                raise shared
        names = tuple(map(label, plain(list(id)))) if id is not None else tuple(map(str, range(n)))
        return cls(
            clean=None,
            corrupt=None,
            answer=((),) * n,
            wrong=((),) * n,
            group=names if group is None else tuple(map(label, plain(list(group)))),
            id=names,
            positions=tuple(held),
            clean_tokens=tuple(columns["clean"]),
            corrupt_tokens=tuple(columns["corrupt"]),
            answer_tokens=tuple(columns["answer"]),
            wrong_tokens=tuple(columns["wrong"]),
            notes=() if group is not None else (no_groups("pairs"),),
            source="tokens",
        )

    def __len__(self) -> int:
        return len(self.id)

    def __getitem__(self, index: int | slice) -> "Pairs":
        rows = range(len(self))[index]
        return self.take(rows if isinstance(rows, range) else [rows])

    def __repr__(self) -> str:
        """Sizes only: prompts may be harmful or unpublished, and a notebook prints this."""
        if self.clean_tokens is not None and self.corrupt_tokens is not None:
            tokens = [_mean(map(len, side)) for side in (self.clean_tokens, self.corrupt_tokens)]
            sizes = f"clean~{tokens[0]} tokens, corrupt~{tokens[1]} tokens"
        else:
            words = [
                _mean(len(prompt_text(prompt).split()) for prompt in side)
                for side in (self.clean or (), self.corrupt or ())
            ]
            sizes = f"clean~{words[0]} words, corrupt~{words[1]} words"
        chat = "" if self.chat is None else ", chat"
        return f"Pairs(n={len(self)}, groups={len(set(self.group))}, {sizes}{chat}, fingerprint={self.fingerprint})"

    def take(self, indices: Iterable[int]) -> "Pairs":
        """The same, for these pairs only, in this order."""
        chosen = [range(len(self))[int(index)] for index in indices]
        if not chosen:
            raise BadPrompts(f"No pair is left of {len(self)}.", hint="Choose at least one.")
        return replace(self, **{name: tuple(value[i] for i in chosen) for name, value in self._columns().items()})

    def swapped(self) -> "Pairs":
        """Clean and corrupt, answer and wrong change places: the patch in the other direction."""
        return replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            answer=self.wrong,
            wrong=self.answer,
            clean_tokens=self.corrupt_tokens,
            corrupt_tokens=self.clean_tokens,
            answer_tokens=self.wrong_tokens,
            wrong_tokens=self.answer_tokens,
            positions=tuple(
                {name: (value[1], value[0]) if isinstance(value, tuple) else value for name, value in held.items()}
                for held in self.positions
            ),
        )

    def with_chat(self, chat: ChatTemplate) -> "Pairs":
        """The same prompts, to be read as chats; the template is applied when they are encoded.

        Raises:
            BadPrompts: The pairs are made of tokens.
        """
        if self.clean is None:
            raise BadPrompts(
                "A chat template was asked for pairs that are made of tokens.",
                hint="Apply the template before, and give the tokens of the result.",
            )
        return replace(self, chat=chat)

    def describe(self) -> str:
        """What the prompts are, in one line, without any prompt."""
        chat = "no chat template" if self.chat is None else self.chat.describe()
        return (
            f"{self.source}: {len(self)} pairs in {len(set(self.group))} groups, {chat}, fingerprint {self.fingerprint}"
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when any prompt, answer, group, id, position or the chat template changes."""
        content = {name: value for name, value in self._columns().items()}
        chat = None if self.chat is None else self.chat.settings()
        return fingerprint_of({"kind": "pairs", "chat": chat, **content})

    def encode(
        self,
        tokenizer: Any,
        *,
        prepend_bos: bool | None = None,
        ragged: RaggedPolicy = "align",
        answers: AnswerPolicy = "single",
        n_ctx: int | None = None,
    ) -> TokenPairs:
        """Tokens, answer sets and the alignment of clean and corrupt, once and for all analyses.

        Args:
            tokenizer: A Hugging Face tokenizer; None for pairs made of tokens.
            prepend_bos: None leaves the beginning-of-sequence token to the tokenizer and adds no second one.
            ragged: Pairs of unequal length: "align" pairs their common beginning and end, "drop" leaves them out,
                "error" raises.
            answers: "single" wants every answer to be one token; "first-token" takes the first of several.
            n_ctx: The longest prompt that the model can read.

        Raises:
            BadAnswer: An answer is not one token, or stands on both sides.
            BadPrompts: Prompts that cannot be encoded, are too long, or whose named positions are not found.
        """
        return encode_pairs(self, tokenizer, prepend_bos=prepend_bos, ragged=ragged, answers=answers, n_ctx=n_ctx)

    def _columns(self) -> dict[str, tuple[Any, ...]]:
        names = ("clean", "corrupt", "answer", "wrong", "group", "id", "positions")
        tokens = ("clean_tokens", "corrupt_tokens", "answer_tokens", "wrong_tokens")
        return {name: getattr(self, name) for name in (*names, *tokens) if getattr(self, name) is not None}


def _mean(lengths: Iterable[int]) -> int:
    numbers = list(lengths)
    return round(sum(numbers) / max(len(numbers), 1))
