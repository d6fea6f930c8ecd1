"""The bundled model is small, loads as any Llama does, writes readable English about Python, and knows when to end."""

import math
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

import pagewire
from tools.bundled_model import corpus, train

DIRECTORY = Path(pagewire.__file__).parent / "bundled_model"

MAX_BYTES = 12_000_000

# Written for this test, so in no corpus.
PARAGRAPH = (
    "Return a list of the names that are defined in the given module. If the optional argument is true, names that "
    "begin with an underscore are included as well. The order of the names in the list is not specified. If the "
    "module cannot be found, an ImportError is raised."
)

PARAGRAPH_BOUND = 25.0
"""Perplexity per token. Measured: 15.9, and 26,600 for the same words shuffled."""

PROMPTS = ("The Python standard library", "This function returns", "A generator is", "If the argument is None")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)


@pytest.fixture(scope="module")
def english() -> set[str]:
    """Return the words of the language reference and of the standard library that the running Python carries."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = [root / "pydoc_data" / "topics.py", *root.glob("*.py")]
    text = " ".join(path.read_text(encoding="utf-8") for path in sources)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", text)}


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, token_ids: list[int]) -> float:
    """Return the perplexity per token of ``token_ids`` after their first."""
    ids = torch.tensor([token_ids])
    return math.exp(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())


@torch.no_grad()
def end_probability(model: LlamaForCausalLM, token_ids: list[int]) -> float:
    """Return the probability that the end of text follows ``token_ids``."""
    return model(torch.tensor([token_ids])).logits[0, -1].softmax(-1)[0].item()


def continuation(model: LlamaForCausalLM, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return the greedy continuation of ``prompt``, at most ``tokens`` long, without the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_files_are_the_documented_ones_and_at_most_twelve_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert set(sizes) == {
        "LICENSE",
        "MODEL_CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= MAX_BYTES


def test_the_weights_are_finite_bfloat16_with_one_matrix_for_embedding_and_output() -> None:
    with safe_open(DIRECTORY / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["model.embed_tokens.weight"].shape == (4096, 256)
    assert "lm_head.weight" not in tensors


def test_it_loads_as_a_llama_with_grouped_queries_that_ends_at_token_zero(model: LlamaForCausalLM) -> None:
    assert model.config.num_attention_heads == 4
    assert model.config.num_key_value_heads == 2
    assert model.config.head_dim == 64
    assert model.config.max_position_embeddings == 1024
    assert model.generation_config.eos_token_id == 0


def test_an_unseen_paragraph_about_python_is_likely_and_its_words_shuffled_are_not(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    shuffled = " ".join(sorted(PARAGRAPH.split(), key=lambda word: word[::-1]))
    assert perplexity(model, tokenizer.encode(PARAGRAPH)) < PARAGRAPH_BOUND
    assert perplexity(model, tokenizer.encode(shuffled)) > 10 * PARAGRAPH_BOUND


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_greedy_continuation_is_readable_english(
    model: LlamaForCausalLM, tokenizer: Any, english: set[str], prompt: str
) -> None:
    text = continuation(model, tokenizer, prompt, 60)
    assert text.isascii()
    assert text.replace("\n", " ").isprintable()
    words = re.findall(r"[A-Za-z]+", text)
    known = [word for word in words if word.lower() in english]
    assert len(words) >= 5
    assert len(known) >= 0.9 * len(words), f"too few known words in {text!r}"
    assert len(set(words)) >= 0.4 * len(words), f"too many repeats in {text!r}"


def test_the_end_of_text_follows_a_finished_text_and_not_half_a_sentence(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    assert end_probability(model, tokenizer.encode(PARAGRAPH)) > 0.1
    assert end_probability(model, tokenizer.encode("Return a list of the")) < 1e-3


@given(text=st.text())
@example(text="def f(x):\n\treturn {'a': x}  # done\r\n")
@example(text="naïve 漢字 🙂 e\u0301 \u200d\ufeff\x00")
def test_any_text_has_tokens_and_comes_back_whole(tokenizer: Any, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert all(0 <= token_id < 4096 for token_id in token_ids)
    assert token_ids[0] == 0
    assert tokenizer.decode(token_ids[1:]) == text


def test_english_takes_at_most_one_token_per_three_characters(tokenizer: Any) -> None:
    assert len(tokenizer.encode(PARAGRAPH)) <= len(PARAGRAPH) / 3


def test_the_chat_template_names_the_speakers_and_leaves_the_turn_to_the_assistant(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And a tuple?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|endoftext|>Be brief.\nUser: What is a list?\nAssistant: Yes.<|endoftext|>User: And a tuple?\nAssistant:"
    )


def test_cleaning_keeps_prose_and_drops_sessions_code_and_rules() -> None:
    raw = (
        "Opening a file\n**************\n\nThe ``open()`` function returns\na :class:`file object`, as in::\n\n"
        "    with open(name) as f:\n        f.read()\n\nThe file is closed at the end of the block.\n\n"
        ">>> open('x')\nTraceback (most recent call last):\n\n"
        "The mode is one of:\n* “r” to read from the file\n* “w” to write to the file"
    )
    assert corpus.clean(raw).split("\n\n") == [
        "The open() function returns a file object, as in:",
        "The file is closed at the end of the block.",
        "The mode is one of:",
        '* "r" to read from the file',
        '* "w" to write to the file',
    ]


def test_a_resumed_training_gives_the_same_weights_as_an_undisturbed_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, tokens in (("BATCH_TOKENS", 128), ("CONTEXT", 128), ("SHORT_WINDOW", 64)):
        monkeypatch.setattr(train, name, tokens)
    small = train.model_config()
    small.num_hidden_layers = 1
    monkeypatch.setattr(train, "model_config", lambda: small)
    stream = torch.arange(500)
    budget = train.Budget(seconds=0, steps=4)

    undisturbed = train.Run(stream, 7, tmp_path / "undisturbed.pt")
    train.train(undisturbed, budget, stream)

    interrupted = train.Run(stream, 7, tmp_path / "interrupted.pt")
    for step in range(2):
        interrupted.train_step(budget.progress(step, 0))
    interrupted.save()
    resumed = train.Run(stream, 7, tmp_path / "interrupted.pt")
    assert resumed.step == 2
    train.train(resumed, budget, stream)

    expected, actual = undisturbed.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
