"""Segments of a token axis, said once for all ops.

Inside an op, `lengths` is a list of ints: `[L]` means equal segments of L tokens, a longer list gives each segment's
length. (One ragged segment and one equal segment are the same thing, so the form is unambiguous.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def segment_offsets(lengths: Sequence[int], tokens: int) -> list[int]:
    """(S + 1,) first token of each segment, then `tokens`."""
    if len(lengths) == 1:
        return list(range(0, tokens + 1, lengths[0]))
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets


def check_segment_length(op: str, segment_length: int | Sequence[int], name: str, tokens: int) -> list[int]:
    """The op's `lengths` list for the `tokens` tokens of tensor `name`, or a ValueError that says what was expected."""
    if not isinstance(segment_length, int) and hasattr(segment_length, "tolist"):  # lengths in a tensor or array
        segment_length = segment_length.tolist()
    if isinstance(segment_length, (int, torch.SymInt)):
        if segment_length < 1:
            raise ValueError(f"{op}: segment_length is {segment_length}; expected a positive number of tokens")
        if tokens % segment_length != 0:
            raise ValueError(
                f"{op}: {name} has {tokens} tokens; expected a multiple of segment_length={segment_length}"
            )
        return [segment_length]
    lengths = list(segment_length) if isinstance(segment_length, Sequence) else [segment_length]
    if not lengths or any(not isinstance(length, (int, torch.SymInt)) or length < 1 for length in lengths):
        raise ValueError(f"{op}: segment_length is {lengths}; expected one or more positive ints")
    if sum(lengths) != tokens:
        raise ValueError(f"{op}: segment_length sums to {sum(lengths)}; expected the {tokens} tokens of {name}")
    return lengths
