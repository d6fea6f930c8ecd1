"""Train the bundled model: ``python -m tools.bundled_model.train --minutes 45``.

One command reads the corpus, makes the tokenizer, trains for a budget of minutes or of steps and writes the model's
directory. Started again with the same arguments it goes on from its last checkpoint. With ``--steps`` the result
depends only on the seed, the text and the machine's arithmetic; with ``--minutes`` also on the machine's speed.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.bundled_model.corpus import Corpus, read_corpus
from tools.bundled_model.tokenizer import END_ID, train_tokenizer, write_tokenizer

VOCAB_SIZE = 4096

CONTEXT = 1024
"""Tokens of the longest window trained on, and the model's maximum length."""

SHORT_WINDOW = 256
"""Tokens per window in the first part of the run: attention over it is cheap, and most documents are short."""

SHORT_PART = 0.75
"""The part of the run on short windows; the rest is on windows of the whole context."""

BATCH_TOKENS = 4096
PEAK_RATE = 3e-3
WARMUP_PART = 0.03
WEIGHT_DECAY = 0.1

LOG_SECONDS = 30
CHECKPOINT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: for ``steps`` optimizer steps if given, else for ``seconds`` of training time."""

    seconds: float
    steps: int | None

    def progress(self, step: int, elapsed: float) -> float:
        """Return the part of the run that is done, 0 to 1."""
        return step / self.steps if self.steps is not None else min(1.0, elapsed / self.seconds)


def model_config() -> LlamaConfig:
    """Llama's architecture at 5.2 million parameters: 4 query heads over 2 key/value heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    if progress < WARMUP_PART:
        return PEAK_RATE * (progress + 1e-3) / WARMUP_PART
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_PART) / (1 - WARMUP_PART)))


def token_stream(documents: list[str], tokenizer: tokenizers.Tokenizer) -> torch.Tensor:
    """Encode ``documents`` into one int64 stream with the end-of-text token before, between and after them."""
    ids = [END_ID]
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += [*encoding.ids, END_ID]
    return torch.tensor(ids, dtype=torch.int64)


def window_batch(stream: torch.Tensor, window: int, seed: int, step: int) -> torch.Tensor:
    """Return one step's windows, int64 ``[BATCH_TOKENS / window, window + 1]``, from random places of ``stream``.

    A function of (seed, step) alone, so that a resumed run sees what an undisturbed one would have seen.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - window, (BATCH_TOKENS // window,), generator=generator)
    return stream[starts[:, None] + torch.arange(window + 1)]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Return the mean negative log likelihood of ``stream``, nats per token, in windows of the whole context."""
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT):
        window = stream[start : start + CONTEXT + 1]
        logits = model(window[None, :-1]).logits[0].float()
        total += cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


class Run:
    """A model in training: its weights, its optimizers and how far it is."""

    def __init__(self, stream: torch.Tensor, seed: int, checkpoint: Path) -> None:
        """Start from random weights, or from ``checkpoint`` if it exists."""
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(model_config())
        self.optimizers = _optimizers(self.model)
        self.step = 0
        self.elapsed = 0.0
        self._stream = stream
        self._seed = seed
        self._checkpoint = checkpoint
        if checkpoint.exists():
            self._load()

    def train_step(self, progress: float) -> float:
        """Take one optimizer step and return its loss in nats per token."""
        started = time.monotonic()
        batch = window_batch(self._stream, SHORT_WINDOW if progress < SHORT_PART else CONTEXT, self._seed, self.step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.elapsed += time.monotonic() - started
        return loss.item()

    def save(self) -> None:
        """Replace the checkpoint."""
        state = {"step": self.step, "elapsed": self.elapsed, "model": self.model.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        new = self._checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns more per token at this size; AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(run: Run, budget: Budget, held_out: torch.Tensor) -> None:
    """Train to the end of ``budget``, with a log line and a checkpoint now and then, and a checkpoint at the end."""
    logged_at = saved_at = run.elapsed
    while (progress := budget.progress(run.step, run.elapsed)) < 1:
        loss = run.train_step(progress)
        if run.elapsed - logged_at > LOG_SECONDS:
            logged_at = run.elapsed
            rate = run.step * BATCH_TOKENS / run.elapsed
            print(f"step {run.step} {run.elapsed:.0f}s {rate:.0f} tokens/s loss {loss:.3f}", flush=True)
        if run.elapsed - saved_at > CHECKPOINT_SECONDS:
            saved_at = run.elapsed
            run.save()
            print(f"step {run.step} held-out loss {mean_loss(run.model, held_out):.3f}", flush=True)
    run.save()


def write_model(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Write ``model`` in bfloat16 and ``tokenizer`` as a directory that transformers loads."""
    model.bfloat16()
    model.generation_config = GenerationConfig.from_dict({f"{role}_token_id": END_ID for role in ("bos", "eos", "pad")})
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, out, CONTEXT)


def facts(run: Run, corpus: Corpus, stream: torch.Tensor, held_out: torch.Tensor, out: Path) -> dict[str, Any]:
    """Return what the model card says about the run; the loss is that of the model as written to ``out``."""
    loss = mean_loss(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), held_out)
    held_out_characters = sum(map(len, corpus.held_out))
    return {
        "parameters": run.model.num_parameters(),
        "steps": run.step,
        "tokens_seen": run.step * BATCH_TOKENS,
        "training_seconds": round(run.elapsed),
        "documents": len(corpus.train),
        "tokens": len(stream),
        "characters_by_source": corpus.sources,
        "held_out_documents": len(corpus.held_out),
        "held_out_tokens": len(held_out),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "held_out_bits_per_character": round(loss * len(held_out) / math.log(2) / held_out_characters, 3),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main() -> None:
    """Read the arguments and make the model."""
    parser = argparse.ArgumentParser(description="Train the bundled model and write its directory.")
    parser.add_argument("--out", type=Path, default=Path("pagewire/bundled_model"), help="model directory to write")
    parser.add_argument("--work", type=Path, default=Path("build/bundled_model"), help="for the checkpoint and facts")
    parser.add_argument("--stdlib", type=Path, help="a standard library's directory; default: the running Python's")
    parser.add_argument("--minutes", type=float, default=45, help="training time, when --steps is not given")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of {BATCH_TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(args.stdlib, seed=args.seed)
    tokenizer = train_tokenizer(corpus.train, VOCAB_SIZE)
    stream = token_stream(corpus.train, tokenizer)
    held_out = token_stream(corpus.held_out, tokenizer)
    run = Run(stream, args.seed, args.work / "checkpoint.pt")
    print(f"{len(stream)} training tokens, {len(held_out)} held out; starting at step {run.step}", flush=True)
    train(run, Budget(args.minutes * 60, args.steps), held_out)
    write_model(run.model, tokenizer, args.out)
    report = json.dumps({"seed": args.seed} | facts(run, corpus, stream, held_out, args.out), indent=2)
    (args.work / "facts.json").write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
