"""From pairs of text to pairs of tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from mech_align.errors import BadAnswer, BadPrompts
from mech_align.prompts.answers import AnswerPolicy, answer_token, overlap
from mech_align.prompts.chat import ChatTemplate, Prompt
from mech_align.prompts.named_positions import position_index, positions_in_text
from mech_align.prompts.problems import say_some
from mech_align.prompts.token_pairs import TokenPairs, aligned_pair
from mech_align.prompts.tokenizing import PromptIds, pieces, prompt_ids, spans, special_id, template_start, text_ids

if TYPE_CHECKING:
    from mech_align.prompts.pairs import Pairs

RaggedPolicy = Literal["align", "drop", "error"]


def encode_pairs(
    pairs: "Pairs",
    tokenizer: Any,
    *,
    prepend_bos: bool | None,
    ragged: RaggedPolicy,
    answers: AnswerPolicy,
    n_ctx: int | None,
) -> TokenPairs:
    """See :meth:`mech_align.prompts.Pairs.encode`."""
    check_policy("ragged", ragged, get_args(RaggedPolicy))
    check_policy("answers", answers, get_args(AnswerPolicy))
    notes = [*pairs.notes]
    settings: dict[str, Any] = {"ragged": ragged, "answers": answers, "prepend_bos": prepend_bos, "chat_template": None}
    settings |= {"source": pairs.source, "fingerprint": pairs.fingerprint}
    if pairs.clean_tokens is not None and pairs.corrupt_tokens is not None:
        clean, corrupt = [list(ids) for ids in pairs.clean_tokens], [list(ids) for ids in pairs.corrupt_tokens]
        answer, wrong = list(pairs.answer_tokens or ()), list(pairs.wrong_tokens or ())
        custom = [
            {
                name: (position_index(value, clean[i], pair, name, 0), position_index(value, corrupt[i], pair, name, 1))
                for name, value in pairs.positions[i].items()
            }
            for i, pair in enumerate(pairs.id)
        ]
    else:
        read = [
            encode_prompts(side, pairs.id, tokenizer, name=name, chat=pairs.chat, prepend_bos=prepend_bos)
            for name, side in (("clean", pairs.clean or ()), ("corrupt", pairs.corrupt or ()))
        ]
        clean, corrupt = [one.ids for one in read[0]], [one.ids for one in read[1]]
        answer, wrong, said = _answer_sets(pairs, tokenizer, read[0], read[1], answers)
        notes += _notes_on_prompts(tokenizer, [*read[0], *read[1]], pairs.chat) + said
        custom = [positions_in_text(pairs, i, tokenizer, read[0][i], read[1][i]) for i in range(len(pairs))]
        settings |= describe_encoding(tokenizer, read[0], pairs.chat)
    check_context([*pairs.id, *pairs.id], [*clean, *corrupt], n_ctx)
    for i, pair in enumerate(pairs.id):
        if (shared := overlap(tokenizer, answer[i], wrong[i], f"pair {pair}")) is not None:
            raise shared
    notes += _notes_on_names(custom)
    aligned = [aligned_pair(clean[i], corrupt[i], custom[i]) for i in range(len(pairs))]
    encoded = TokenPairs(
        clean=clean,
        corrupt=corrupt,
        answer=answer,
        wrong=wrong,
        group=pairs.group,
        id=pairs.id,
        source_position=[one.source_position for one in aligned],
        named=[one.named for one in aligned],
        named_clean=[one.named_clean for one in aligned],
        notes=notes,
        settings=settings,
    )
    return _with_ragged(encoded, ragged)


def encode_prompts(
    prompts: Sequence[Prompt],
    ids: Sequence[str],
    tokenizer: Any,
    *,
    name: str,
    chat: ChatTemplate | None,
    prepend_bos: bool | None,
) -> list[PromptIds]:
    """Each prompt as tokens; ``name`` is the field that they stand in, for messages."""
    if tokenizer is None:
        raise BadPrompts(
            "These prompts are text, and the model has no tokenizer.",
            hint="Give the model its tokenizer, or build the pairs with Pairs.from_tokens(...).",
        )
    encoded: list[PromptIds] = []
    start = None if chat is not None else template_start(tokenizer)
    for prompt, pair in zip(prompts, ids, strict=True):
        if chat is None and not isinstance(prompt, str):
            raise BadPrompts(
                f"The prompt `{name}` of {pair} is a list of messages, and no chat template was chosen.",
                hint="Say which: pairs.with_chat(ChatTemplate()) uses the tokenizer's own.",
            )
        try:
            text = prompt if chat is None and isinstance(prompt, str) else _chat(chat).render(prompt, tokenizer)
            encoded.append(
                prompt_ids(
                    tokenizer, text, prepend_bos=prepend_bos, from_template=chat is not None, template_start=start
                )
            )
        except BadPrompts as error:
            raise BadPrompts(f"`{name}` of {pair}: {error.what}", why=error.why, hint=error.hints) from error
    return encoded


def describe_encoding(tokenizer: Any, encoded: Sequence[PromptIds], chat: ChatTemplate | None) -> dict[str, Any]:
    """How text became tokens, as plain data for the manifest."""
    starts = {tuple(pieces(tokenizer, one.ids[: one.n_added])) for one in encoded}
    return {
        "tokenizer": str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
        "added_before_prompt": [" ".join(start) for start in sorted(starts)],
        "chat_template": None if chat is None else chat.describe(),
    }


def check_context(ids: Sequence[str], tokens: Sequence[Sequence[int]], n_ctx: int | None) -> None:
    """Raise for prompts that the model has no positions for.

    Raises:
        BadPrompts: Some prompt has more than ``n_ctx`` tokens; says which.
    """
    long = {name: len(row) for name, row in zip(ids, tokens, strict=True) if n_ctx is not None and len(row) > n_ctx}
    if long:
        raise BadPrompts(
            f"{len(long)} prompts are longer than the model's context of {n_ctx} tokens.",
            why=say_some([f"{name} has {length}" for name, length in long.items()]),
            hint="Shorten them, leave them out with pairs.take(...), or use a model with a longer context.",
        )


def _chat(chat: ChatTemplate | None) -> ChatTemplate:
    assert chat is not None, "messages without a template are refused before"
    return chat


def check_policy(name: str, value: str, known: Sequence[str]) -> None:
    """Raise for a setting that is none of the known ones."""
    if value not in known:
        raise BadPrompts(f"{name}={value!r} is not known.", hint=f"Use one of {', '.join(map(repr, known))}.")


def _with_ragged(encoded: TokenPairs, ragged: RaggedPolicy) -> TokenPairs:
    """Say which pairs differ in length or not at all, and do with them what the user chose."""
    n = len(encoded)
    unequal = [i for i in range(n) if len(encoded.clean[i]) != len(encoded.corrupt[i])]
    lengths = [f"{encoded.id[i]} ({len(encoded.clean[i])} and {len(encoded.corrupt[i])} tokens)" for i in unequal]
    notes: list[str] = []
    if unequal and ragged == "error":
        raise BadPrompts(
            f"{len(unequal)} of {n} pairs differ in length: {say_some(lengths)}.",
            hint=['ragged="align" pairs their common beginning and end.', 'ragged="drop" leaves these pairs out.'],
        )
    if unequal and ragged == "drop":
        keep = [i for i in range(n) if i not in set(unequal)]
        if not keep:
            raise BadPrompts(
                'ragged="drop" leaves no pair: in all of them clean and corrupt differ in length.',
                why=say_some(lengths),
                hint='ragged="align" pairs their common beginning and end.',
            )
        encoded = encoded.take(keep)
        notes.append(f"{len(unequal)} of {n} pairs differ in length and were dropped: {say_some(lengths)}")
    elif unequal:
        alone = sum(int((encoded.source_position[i] < 0).sum()) for i in unequal)
        notes.append(
            f"{len(unequal)} of {n} pairs differ in length: {alone} corrupt positions have no partner and stay corrupt"
        )
    same = [encoded.id[i] for i in range(len(encoded)) if encoded.clean[i] == encoded.corrupt[i]]
    if same:
        notes.append(f"{len(same)} of {len(encoded)} pairs have the same clean and corrupt tokens: {say_some(same)}")
    lacking = [
        name
        for name, clean, corrupt, named in zip(encoded.id, encoded.clean, encoded.corrupt, encoded.named, strict=True)
        if clean != corrupt and not named["differs"]
    ]
    if lacking:
        notes.append(
            f'{len(lacking)} corrupt prompts only lack tokens, so that "differs" is empty: {say_some(lacking)}'
        )
    return replace(encoded, notes=[*encoded.notes, *notes])


def _answer_sets(
    pairs: "Pairs", tokenizer: Any, clean: Sequence[PromptIds], corrupt: Sequence[PromptIds], policy: AnswerPolicy
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[str]]:
    """Answers after the clean prompts, wrong ones after the corrupt prompts, as token sets; and how they were found."""
    sets: dict[str, list[tuple[int, ...]]] = {"answer": [], "wrong": []}
    how: dict[str, list[str]] = {"alone": [], "first token": []}
    failed: dict[str, BadAnswer] = {}
    n_failed = 0
    for name, texts, prompts in (("answer", pairs.answer, clean), ("wrong", pairs.wrong, corrupt)):
        for pair, choices, prompt in zip(pairs.id, texts, prompts, strict=True):
            tokens: list[int] = []
            body = prompt.ids[prompt.n_added :]
            for choice in choices:
                where = f"pair {pair}, `{name}`" if choice not in failed else ""
                try:
                    one = answer_token(tokenizer, prompt.text, choice, policy=policy, where=where, before=body)
                except BadAnswer as error:
                    failed.setdefault(choice, error)
                    n_failed += 1
                    continue
                tokens.append(one.token)
                if one.how in how:
                    how[one.how].append(f"{choice!r} as {pieces(tokenizer, [one.token])[0]!r} ({one.token})")
            sets[name].append(tuple(dict.fromkeys(tokens)))
    if failed:
        first = next(iter(failed.values()))
        others = "" if n_failed == 1 else f" In all {n_failed} answers fail so: {say_some([repr(a) for a in failed])}."
        raise BadAnswer(first.what, why=first.why + others, hint=first.hints)
    notes: list[str] = []
    if how["alone"]:
        said = say_some(list(dict.fromkeys(how["alone"])))
        notes.append(
            f"{len(how['alone'])} answers are no single token written after their prompt, and were read alone: {said}"
        )
    if how["first token"]:
        said = say_some(list(dict.fromkeys(how["first token"])))
        notes.append(f"{len(how['first token'])} answers of several tokens stand for their first one: {said}")
    return sets["answer"], sets["wrong"], notes


def _notes_on_prompts(tokenizer: Any, prompts: Sequence[PromptIds], chat: ChatTemplate | None) -> list[str]:
    notes = list(dict.fromkeys(note for prompt in prompts for note in prompt.notes))
    if chat is not None:
        notes.append(chat.describe())
        bos = special_id(tokenizer, "bos")
        plain_start = text_ids(tokenizer, "x", special=True)[:1]
        if bos is not None and plain_start == [bos] and all(bos not in prompt.ids for prompt in prompts):
            notes.append("the chat template writes no BOS token, which this tokenizer puts before plain text")
    spaced = sum(prompt.text.endswith(" ") for prompt in prompts)
    if spaced:
        notes.append(
            f"{spaced} of {len(prompts)} prompts end with a space, which tokenizers write at the start of the next "
            "word: the model has seldom read such a text"
        )
    unknown = special_id(tokenizer, "unk")
    if unknown is not None:
        spelled = pieces(tokenizer, [unknown])[0]
        holding = sum(_holds_unknown(tokenizer, prompt, unknown, spelled) for prompt in prompts)
        if holding:
            notes.append(
                f"{holding} of {len(prompts)} prompts hold text that the tokenizer does not know ({spelled!r})"
            )
    return notes


def _notes_on_names(custom: Sequence[dict[str, tuple[list[int], list[int]]]]) -> list[str]:
    held = Counter(name for names in custom for name in names)
    uneven = Counter(name for names in custom for name, (clean, corrupt) in names.items() if len(clean) != len(corrupt))
    said = [
        f"the position {name!r} covers unequal numbers of clean and corrupt tokens in {n} pairs: not paired one by one"
        for name, n in uneven.items()
    ]
    n_pairs = len(custom)
    return said + [
        f"the position {name!r} is given in {n} of {n_pairs} pairs" for name, n in held.items() if n < n_pairs
    ]


def _holds_unknown(tokenizer: Any, prompt: PromptIds, unknown: int, spelled: str) -> bool:
    body = prompt.ids[prompt.n_added :]
    if unknown not in body:
        return False
    covered = spans(tokenizer, prompt.text)
    if covered is None:
        return spelled not in prompt.text
    at = [span for token, span in zip(body, covered, strict=True) if token == unknown]
    return any(prompt.text[start:end] != spelled for start, end in at)
