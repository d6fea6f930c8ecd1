"""Text to token ids and back, with the model's own tokenizer, without torch.

A model directory without a tokenizer is served too: token ids go through, text is refused with a clear error.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gateway.detokenizer import Detokenizer, DetokenizerFactory, WindowDetokenizer, factory_for, token_bytes_for
from pagewire.runtime.errors import StartError

# Below this a text is tokenized in about a millisecond, less than handing it to a thread costs under load.
INLINE_CHARS = 2048
TOKENIZER_THREADS = 2

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """The model's tokenizer, its chat template and how its text is followed token by token."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: a `transformers` tokenizer, fast or slow.
        """
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._special = frozenset(tokenizer.all_special_ids)
        # Slow tokenizers keep state in Python objects; one at a time.
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._factory: DetokenizerFactory
        self._token_bytes: Callable[[int], bytes] | None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._factory = factory_for(self._backend)
            self._token_bytes = token_bytes_for(self._backend)
        else:
            self._token_bytes = None
            self._factory = lambda after: WindowDetokenizer(self.decode, self._visible, after)

    @property
    def chat_template(self) -> str | None:
        """The model's own template; None if it has none. Of several named ones, "default"."""
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like, as chat templates want them."""
        return {
            name: str(value) for name, value in self._tokenizer.special_tokens_map.items() if isinstance(value, str)
        }

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text; long ones in a thread."""
        if len(text) <= INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        if self._backend is not None:
            ids: Sequence[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return ids
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        if self._backend is not None:
            fast: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return fast
        with self._lock:
            text: str = self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """Follows one sequence's text, which continues that of `after` if given."""
        return self._factory(after)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special ones included."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text that goes on; empty for special and unknown ids."""
        if self._token_bytes is not None:
            return self._token_bytes(token_id)
        return self.decode([token_id]).encode()

    def close(self) -> None:
        """Ends the threads; texts being tokenized are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _visible(self, token_id: int) -> bool:
        return token_id not in self._special and 0 <= token_id < len(self._tokenizer)


def keep_torch_out() -> None:
    """Makes this process's `transformers` take torch as not installed: its tokenizers need none of it, and loading it
    would cost seconds and hundreds of megabytes. For a gateway's own process only; does nothing once either is loaded.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    blocked: dict[str, Any] = sys.modules  # a None entry means: cannot be imported
    blocked["torch"] = None


def load_tokenizer(model: str) -> Tokenizer | None:
    """Loads a tokenizer from a directory or the hub.

    Returns:
        None if `model` is empty or a model's directory without a tokenizer.

    Raises:
        StartError: the directory does not exist, or what is there is no tokenizer.
    """
    if not model:
        return None
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in TOKENIZER_FILES):
            if not (path / "config.json").is_file():
                raise StartError(f"--model {model} holds neither a model nor a tokenizer; give another directory")
            return None
    elif path.exists() or model.startswith(("/", ".", "~")):
        raise StartError(f"--model {model}: there is no such directory; give a model directory or a hub id")
    # Imported by name when needed: a gateway for token ids starts without it.
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever the library raises for a bad file, name or network
        kind = type(error).__name__
        raise StartError(
            f"--model {model}: its tokenizer cannot be loaded ({kind}); check the files, the hub id or the network, "
            "or leave --model empty to serve token ids only"
        ) from error
    return Tokenizer(loaded)
