"""Small tokenizers of the two great families, made in the test, and the gateway's view of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "Grüße aus München, naïve café, déjà vu",
    "日本語のテキスト 中文文本 🙂🙃 👩‍👩‍👧",
    "def f(x):\n    return x + 1\n\n",
]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@lru_cache
def byte_level() -> Tokenizer:
    """Byte-level BPE as of GPT-2 and Llama 3, with special tokens <pad> 0 and <eos> 1 and a plain added one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<plain added é>", special=False)])
    return tokenizer


@lru_cache
def sentencepiece_like() -> Tokenizer:
    """BPE over spaces as U+2581 with byte fallback, as of Llama 2, with special tokens <unk> 0, <eos> 1."""
    vocab = {"<unk>": 0, "<eos>": 1}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyzéü語":
        vocab[char] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("c", "a"), ("ca", "t")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


@lru_cache
def word_piece() -> Tokenizer:
    """WordPiece as of BERT: a decoder of neither family, which puts spaces between words."""
    words = ["<unk>", "<eos>", "the", "cat", "##s", "##ing", "run", ",", "dog", "##é", "'", "s"]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    return tokenizer


def as_transformers(tokenizer: Tokenizer, template: str | None = TEMPLATE) -> Any:
    """The tokenizer as `transformers` has it, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = template
    return fast
