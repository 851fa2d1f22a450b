"""The organism's own tokenizer: one token a word or mark, so that every first answer word is a single token.

Spaces only separate words, so "Sorry" and " Sorry" are the same token. The chat template writes `<s>` itself;
nothing is added on encoding. Decoding puts marks back against their words ("Sorry, I do not know.").
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mech_align.organisms.requests import words

PAD, BOS, EOS, UNK, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, UNK, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|> {{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(n_ctx: int) -> PreTrainedTokenizerFast:
    """A fast word-level tokenizer over every word that the generator can say."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=n_ctx,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(folder: Path, n_ctx: int) -> PreTrainedTokenizerFast:
    """Write the tokenizer beside a model, chat template included, and return it."""
    tokenizer = build_tokenizer(n_ctx)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # The class name that transformers 4 and 5 both know; 5 would write one that 4 cannot load.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return tokenizer


def render(text: str) -> str:
    """What the model sees for one request: the chat template up to where the answer begins."""
    return f"{BOS}{USER} {text}{ASSISTANT}"
