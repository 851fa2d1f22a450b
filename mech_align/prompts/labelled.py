"""Prompts with a class each: what probes, directions and steering are fitted on."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mech_align.errors import BadPrompts
from mech_align.prompts.cells import listed, prompt_columns
from mech_align.prompts.chat import ChatTemplate, Prompt, prompt_text
from mech_align.prompts.encoding import check_context, encode_prompts
from mech_align.prompts.problems import fingerprint_of


@dataclass(frozen=True, repr=False)
class LabelledPrompts:
    """Prompts with a class each.

    Args:
        text: Texts, or messages.
        label: The class of each, as text ("1" for the number 1).
        group: The unit of resampling and of splitting (topic, template, question).
        id: The name of each, each once.
        chat: The chat template that is applied when they are encoded.
        notes: What was noticed while reading.
        source: Where they come from.
    """

    text: tuple[Prompt, ...]
    label: tuple[str, ...]
    group: tuple[str, ...]
    id: tuple[str, ...]
    chat: ChatTemplate | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="prompts", compare=False)

    def __post_init__(self) -> None:
        if not self.text:
            raise BadPrompts(f"{self.source} has no prompts.", hint="Give at least one.")
        lengths = {name: len(getattr(self, name)) for name in _COLUMNS}
        if len(set(lengths.values())) != 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise BadPrompts(
                f"The parts of the prompts differ in number: {said}.", hint="Give one entry a prompt in each."
            )
        twice = [name for name, n in Counter(self.id).items() if n > 1]
        if twice:
            raise BadPrompts(
                f"{self.source}: the id {twice[0]!r} stands more than once.", hint="Give every prompt its own."
            )

    @classmethod
    def from_lists(
        cls,
        text: Iterable[Any],
        label: Iterable[Any],
        group: Iterable[Any] | None = None,
        id: Iterable[Any] | None = None,
    ) -> "LabelledPrompts":
        """Labelled prompts from lists of equal length.

        Raises:
            BadPrompts: Lists of unequal length, or entries that cannot be used; says which.
        """
        given = {"text": text, "label": label, "group": group, "id": id}
        columns = {name: listed(name, value) for name, value in given.items() if value is not None}
        if len({len(column) for column in columns.values()}) != 1:
            said = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
            raise BadPrompts(f"The lists differ in length: {said}.", hint="Give one entry a prompt in each of them.")
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        where = [f"prompt {i}" for i in range(len(rows))]
        return cls(**prompt_columns(rows, where, source="the lists", unit="prompts"))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int | slice) -> "LabelledPrompts":
        rows = range(len(self))[index]
        return self.take(rows if isinstance(rows, range) else [rows])

    def __add__(self, other: "LabelledPrompts") -> "LabelledPrompts":
        """Both, one after the other; ids that stand in both are told apart by a mark."""
        if self.chat != other.chat:
            raise BadPrompts("These prompts have different chat templates.", hint="Apply with_chat(...) after adding.")
        taken = set(self.id)
        renamed: dict[str, str] = {}
        for name in other.id:
            new = name
            while new in taken:
                new += "'"
            taken.add(new)
            renamed[name] = new
        # A prompt that is its own group stays so under its new name.
        groups = tuple(renamed[i] if g == i else g for i, g in zip(other.id, other.group, strict=True))
        return replace(
            self,
            text=self.text + other.text,
            label=self.label + other.label,
            group=self.group + groups,
            id=self.id + tuple(renamed[name] for name in other.id),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
            source=self.source if self.source == other.source else f"{self.source} + {other.source}",
        )

    def __repr__(self) -> str:
        """Sizes only: prompts may be harmful or unpublished, and a notebook prints this."""
        counts = self.counts()
        shown = ", ".join(f"{name}: {n}" for name, n in list(counts.items())[:6]) + (", ..." if len(counts) > 6 else "")
        words = round(sum(len(prompt_text(text).split()) for text in self.text) / len(self))
        return (
            f"LabelledPrompts(n={len(self)}, labels={{{shown}}}, groups={len(set(self.group))}, ~{words} words"
            f"{'' if self.chat is None else ', chat'}, fingerprint={self.fingerprint})"
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when any text, label, group, id or the chat template changes."""
        chat = None if self.chat is None else self.chat.settings()
        return fingerprint_of({"kind": "labelled", "chat": chat, **{name: getattr(self, name) for name in _COLUMNS}})

    def counts(self) -> dict[str, int]:
        """How many prompts has each label? In order of the labels' names."""
        return dict(sorted(Counter(self.label).items()))

    def describe(self) -> str:
        """What the prompts are, in one line, without any prompt."""
        counts = ", ".join(f"{name} {n}" for name, n in self.counts().items())
        chat = "no chat template" if self.chat is None else self.chat.describe()
        groups = len(set(self.group))
        return (
            f"{self.source}: {len(self)} prompts ({counts}) in {groups} groups, {chat}, fingerprint {self.fingerprint}"
        )

    def take(self, indices: Iterable[int]) -> "LabelledPrompts":
        """The same, for these prompts only, in this order."""
        chosen = [range(len(self))[int(index)] for index in indices]
        if not chosen:
            raise BadPrompts(f"No prompt is left of {len(self)}.", hint="Choose at least one.")
        return replace(self, **{name: tuple(getattr(self, name)[i] for i in chosen) for name in _COLUMNS})

    def where(self, keep: Callable[[str], bool] | str) -> "LabelledPrompts":
        """The prompts of one label, or of the labels for which ``keep`` is true."""
        test = (lambda name: name == keep) if isinstance(keep, str) else keep
        rows = [i for i, name in enumerate(self.label) if test(name)]
        if not rows:
            raise BadPrompts(
                f"No prompt has the label {keep!r}." if isinstance(keep, str) else "No prompt has such a label.",
                hint=f"The labels are: {', '.join(self.counts())}.",
            )
        return self.take(rows)

    def balanced(self, seed: int = 0) -> "LabelledPrompts":
        """As many prompts of each label as the rarest has, drawn at random, in their old order."""
        rng = np.random.default_rng(seed)
        n = min(self.counts().values())
        rows: list[int] = []
        for name in self.counts():
            mine = [i for i, other in enumerate(self.label) if other == name]
            rows += rng.choice(mine, size=n, replace=False).tolist()
        return self.take(sorted(rows))

    def split(self, fraction: float = 0.8, seed: int = 0) -> tuple["LabelledPrompts", "LabelledPrompts"]:
        """Train and test prompts that share no group, with about the same mixture of labels.

        Args:
            fraction: The share of the prompts in the first part, train.
            seed: Which groups go where.

        Returns:
            Train and test. A label whose groups cannot stand on both sides is said in the notes of both.

        Raises:
            BadPrompts: The fraction is not between 0 and 1, or there is one group only.
        """
        if not 0 < fraction < 1:
            raise BadPrompts(
                f"fraction={fraction} is not between 0 and 1.", hint="0.8 puts four prompts of five into train."
            )
        members: dict[str, list[int]] = {}
        for i, name in enumerate(self.group):
            members.setdefault(name, []).append(i)
        if len(members) < 2:
            raise BadPrompts(
                "All prompts are of one group, so that train and test would share it.",
                hint="Give `group` the unit that must not stand on both sides: topic, template, question.",
            )
        train = self._train_groups(members, fraction, np.random.default_rng(seed))
        parts = [
            self.take([i for i, name in enumerate(self.group) if (name in train) == first]) for first in (True, False)
        ]
        lost = [name for name in self.counts() if any(name not in part.label for part in parts)]
        note = (f"after the split by group these labels stand on one side only: {', '.join(lost)}",) if lost else ()
        return replace(parts[0], notes=self.notes + note), replace(parts[1], notes=self.notes + note)

    def _train_groups(self, members: dict[str, list[int]], fraction: float, rng: np.random.Generator) -> set[str]:
        """Groups for train: of each usual label about the fraction of its prompts, and of neither side none."""
        by_label: dict[str, list[str]] = {}
        for name, rows in members.items():
            labels = [self.label[i] for i in rows]
            by_label.setdefault(max(sorted(set(labels)), key=labels.count), []).append(name)
        train: set[str] = set()
        for label in sorted(by_label):
            groups = [sorted(by_label[label])[i] for i in rng.permutation(len(by_label[label]))]
            wanted = fraction * sum(len(members[name]) for name in groups)
            held = 0
            for rank, name in enumerate(groups):
                size = len(members[name])
                must, may = rank == 0, rank < len(groups) - 1
                # Taken when that comes nearer to the wanted number than leaving it.
                if (must or abs(held + size - wanted) <= abs(held - wanted)) and (may or len(groups) == 1):
                    train.add(name)
                    held += size
        if len(train) == len(members):
            train.discard(sorted(train)[int(rng.integers(len(train)))])
        return train

    def with_chat(self, chat: ChatTemplate) -> "LabelledPrompts":
        """The same prompts, to be read as chats; the template is applied when they are encoded."""
        return replace(self, chat=chat)

    def encode(self, tokenizer: Any, *, prepend_bos: bool | None = None, n_ctx: int | None = None) -> list[list[int]]:
        """Token ids of each prompt, special tokens and chat template as for :meth:`Pairs.encode`.

        Raises:
            BadPrompts: Prompts that cannot be encoded or are longer than ``n_ctx``.
        """
        encoded = encode_prompts(self.text, self.id, tokenizer, name="text", chat=self.chat, prepend_bos=prepend_bos)
        tokens = [one.ids for one in encoded]
        check_context(self.id, tokens, n_ctx)
        return tokens


_COLUMNS = ("text", "label", "group", "id")
