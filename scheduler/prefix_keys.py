"""The prefix-cache keys of a request's blocks, computed once per request and block size."""

from __future__ import annotations

from scheduler.prefix_cache import extend_chain, start_chain
from scheduler.sequence import Sequence, SequenceGroup


def prompt_keys(group: SequenceGroup, block_size: int) -> list[bytes]:
    """Keys of the prompt's full blocks."""
    keys = group.prompt_hashes
    if keys is None:
        request = group.request
        chain = group.prompt_chain = start_chain(request.tenant)
        keys = group.prompt_hashes = extend_chain(chain, request.prompt, block_size)
    return keys


def output_keys(sequence: Sequence, num_tokens: int, block_size: int) -> list[bytes]:
    """Keys of the full blocks behind the prompt's, in the first `num_tokens` tokens."""
    group = sequence.group
    first = len(prompt_keys(group, block_size)) * block_size
    if num_tokens < first + block_size or group.prompt_chain is None:
        return []
    return extend_chain(group.prompt_chain.copy(), sequence.token_ids[first:num_tokens], block_size)


def lookup_keys(leader: Sequence, block_size: int) -> list[bytes]:
    """Keys of the blocks that a group that starts with this sequence may find: never the one with the last known token,
    which must be computed to sample. Kept while the group queues: its tokens do not change before it starts."""
    group = leader.group
    request = group.request
    if not group.cache_allowed or (request.prompt_logprobs is not None and not group.announced):
        return []
    if group.lookup_keys is None:
        keys = prompt_keys(group, block_size)
        if leader.output:
            keys = keys + output_keys(leader, leader.num_tokens, block_size)
        most = (leader.num_tokens - 1) // block_size
        group.lookup_keys = keys if len(keys) <= most else keys[:most]
    return group.lookup_keys
