"""Every limit on a request's fields in one table, with its reason. The validator takes all its numbers from here.

docs/errors.md shows the same table; a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Ceiling:
    """The closed range that one value must lie in."""

    lowest: float
    """Smallest value that is accepted."""
    highest: float
    """Largest value that is accepted."""
    reason: str
    """Why the range is this one."""


_TABLE = {
    "request_id.length": Ceiling(0, 128, "an id is a key in logs and journals, not a place for data"),
    "tenant.length": Ceiling(0, 128, "a tenant is a key, and the salt of the prefix cache"),
    "prompt.text.bytes": Ceiling(1, 2 << 20, "tokenizing 2 MiB takes about a second; longer text fits no context"),
    "prompt.chat.messages": Ceiling(1, 1024, "every message is a turn of the template's loop"),
    "prompt.chat.messages.role.length": Ceiling(1, 64, "a role is a word that the template knows"),
    "prompt.chat.bytes": Ceiling(0, 2 << 20, "as for text"),
    "prompt.entries": Ceiling(1, 256, "prompts in one HTTP request; each of them is a request of its own"),
    "sampling.temperature": Ceiling(0.0, 100.0, "beyond 100 the distribution is flat already"),
    "sampling.min_p": Ceiling(0.0, 1.0, "a probability"),
    "sampling.top_p": Ceiling(0.0, 1.0, "a probability, and above 0: with nothing kept there is nothing to draw"),
    "sampling.repetition_penalty": Ceiling(0.01, 100.0, "a divisor; further out float16 logits overflow"),
    "sampling.presence_penalty": Ceiling(-10.0, 10.0, "logits rarely spread more than 10 between likely tokens"),
    "sampling.frequency_penalty": Ceiling(-10.0, 10.0, "as presence_penalty, and it is multiplied by a count"),
    "sampling.n": Ceiling(0, 128, "sequences are preempted together, so a group must fit the pool; OpenAI's limit"),
    "sampling.beam_width": Ceiling(0, 32, "as n; wider beams give worse text"),
    "sampling.length_penalty": Ceiling(-10.0, 10.0, "an exponent on a length: further out float32 overflows"),
    "sampling.logit_bias.entries": Ceiling(0, 1024, "each entry is a write on the device at every step"),
    "sampling.logit_bias.value": Ceiling(-100.0, 100.0, "100 already decides alone"),
    "stop.stop.entries": Ceiling(0, 16, "each string is searched for at every token"),
    "stop.stop.length": Ceiling(1, 256, "text as long as this may be held back"),
    "stop.stop_token_ids.entries": Ceiling(0, 128, "each id is compared at every token"),
    "output.logprobs": Ceiling(0, 20, "the largest top-N that a step sorts for; OpenAI's limit"),
    "output.prompt_logprobs": Ceiling(0, 20, "as logprobs, for every token of the prompt"),
    "hold_seconds": Ceiling(0, 86400, "a day; the scheduler's own ceiling is far lower"),
    "park.ttl_seconds": Ceiling(0, 86400, "as hold_seconds"),
    "attach.positions": Ceiling(0, 128, "one per sequence, as n"),
    "detokenize.token_ids": Ceiling(0, 1 << 18, "longer than any context; a longer list would hold up the process"),
}

CEILINGS: Final = MappingProxyType(_TABLE)
"""The table, by the field's path, with `.length`, `.bytes`, `.entries` or `.value` where that is what is limited."""

MAX_N: Final = int(CEILINGS["sampling.n"].highest)
"""Stream numbers that an attach leaves free, because it does not know n yet."""
