"""Three kinds of tokenizer, trained on the spot: byte-level BPE (GPT-2), SentencePiece-like BPE (Llama 2), words."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "One day Lily Tim went to the park She He was happy she he They Sorry I cannot Sure Yes No".split()
TEXT = [f"{a} {b}, {c}." for a in WORDS for b in WORDS for c in WORDS[:6]] + [f"\n{word}" for word in WORDS] * 200

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@cache
def byte_level(*, adds_bos: bool = False, chat: str | None = None, ends: bool = False) -> PreTrainedTokenizerFast:
    """Like GPT-2: a space belongs to the word after it ("ĠShe"), every byte can be written, no BOS by default."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "</s>", *CHAT_MARKS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if adds_bos or ends:
        single = f"{'<|endoftext|> ' if adds_bos else ''}$A{' </s>' if ends else ''}"
        inner.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|endoftext|>", 0), ("</s>", 1)]
        )
    else:
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer.chat_template = chat
    return tokenizer


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Like Llama 2: every text begins with a space mark ("▁She"), <s> first, unknown characters are <unk>."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    inner.decoder = decoders.Metaspace(replacement="▁")
    marked = [f"▁{line.strip().replace(' ', '▁')}" for line in TEXT]
    inner.train_from_iterator(
        marked, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def words() -> PreTrainedTokenizerFast:
    """One token a word or punctuation mark; spaces are not tokens; unknown words are [UNK]; no BOS."""
    vocab = {piece: i for i, piece in enumerate(["[UNK]", *WORDS, ",", "."])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
