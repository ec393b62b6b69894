"""Segments of a token axis, said once for all ops.

Inside an op, `lengths` is a list of ints: `[L]` means equal segments of L tokens, a longer list gives each segment's
length. (One ragged segment and one equal segment are the same thing, so the form is unambiguous.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ard_kernels.common.arguments import check_int, described, is_int


def segment_offsets(lengths: Sequence[int], tokens: int) -> list[int]:
    """(S + 1,) first token of each segment, then `tokens`."""
    if len(lengths) == 1:
        return list(range(0, tokens + 1, lengths[0]))
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return offsets


def segment_count(lengths: Sequence[int], tokens: int) -> int:
    """Number of segments, by an op's `lengths`."""
    return len(lengths) if len(lengths) > 1 else tokens // lengths[0]


def check_segment_length(
    op: str,
    segment_length: int | Sequence[int],
    name: str,
    tokens: int,
    of: tuple = (),
    argument: str = "segment_length",
) -> list[int]:
    """The op's `lengths` list for the `tokens` tokens of tensor `name`, or a ValueError that says what was expected.

    of: (dim, shape, layout) that the tokens were counted in, for the message.
    """
    if not is_int(segment_length) and hasattr(segment_length, "tolist"):  # lengths in a tensor or array
        segment_length = segment_length.tolist()
    if is_int(segment_length):
        length = check_int(op, argument, segment_length, 1, "tokens")
        if tokens % length != 0:
            raise ValueError(
                f"{op}: {name} has {tokens} tokens; expected a multiple of {argument}={length}{_counted(*of)}"
            )
        return [length]
    if not isinstance(segment_length, Sequence) or isinstance(segment_length, (str, bytes)) or not segment_length:
        got = described(segment_length)
        raise ValueError(f"{op}: {argument} is {got}; expected an int or a sequence of ints, one per segment")
    lengths = [check_int(op, f"{argument}[{i}]", n, 1, "tokens") for i, n in enumerate(segment_length)]
    if sum(lengths) != tokens:
        raise ValueError(
            f"{op}: {argument} sums to {sum(lengths)}; expected the {tokens} tokens of {name}{_counted(*of)}"
        )
    return lengths


def _counted(dim: int | None = None, shape: Sequence[int] = (), layout: str = "") -> str:
    return "" if dim is None else f" (tokens are dim {dim} of {tuple(shape)}{layout and f', layout {layout!r}'})"


def check_lengths(op: str, lengths: Sequence[int], tokens: int) -> None:
    """ValueError unless `lengths`, as ops take it, fits `tokens` tokens."""
    check_segment_length(op, lengths[0] if len(lengths) == 1 else lengths, "the input", tokens)
