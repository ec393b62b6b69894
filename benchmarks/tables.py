"""Result rows as Markdown tables, padded so that a terminal shows them well too."""

from __future__ import annotations

from collections.abc import Sequence

# What a reader sees instead of a candidate's name.
WORDS = {
    "N0": "the same student, N=0",
    "cat_flash": "SDPA flash, K and V grown by cat",
    "cat_math": "SDPA math, K and V grown by cat",
    "compile_repeat": "torch.compile, rows repeated",
    "compile_rows": "torch.compile, rows broadcast",
    "eager": "eager PyTorch",
    "flex_compiled": "FlexAttention, compiled",
    "four_teacher_forwards": "four teacher forwards",
    "preallocated_flash": "SDPA flash, K and V copied into memory",
    "preallocated_math": "SDPA math, K and V copied into memory",
    "published_compiled": "published design, compiled",
    "published_eager": "published design, eager",
    "sdpa_dense_bool": "SDPA, dense bool mask",
    "sdpa_dense_float": "SDPA, dense float mask",
    "sdpa_loop_cudnn": "SDPA cuDNN, loop over prefixes",
    "sdpa_loop_efficient": "SDPA efficient, loop over prefixes",
    "sdpa_loop_flash": "SDPA flash, loop over prefixes",
    "sdpa_loop_math": "SDPA math, loop over prefixes",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths = [max(3, width) for width in widths]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [f":{'-' * (w - 1)}" if i < left else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def words(candidate: str) -> str:
    return WORDS.get(candidate, candidate.replace("_", " "))


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def work(row: dict) -> str:
    shape = row["shape"].removeprefix(row["op"]).strip()
    return f"`{row['op']}` {shape}, {row['direction']}"


def verdict(row: dict) -> str:
    return f"{row['target']:.2f}x, {'met' if row['met'] else 'missed'}"


def speed_table(rows: Sequence[dict]) -> str:
    """Ours against the fastest alternative of the same run."""
    cells = []
    for row in rows:
        times, peer = row["milliseconds"], row["best_peer"]
        against = (
            [words(peer), milliseconds(times[peer]["median"]), f"{row['ratio']:.2f}x"] if peer else ["none", "", ""]
        )
        cells.append([work(row), milliseconds(times[row["ours"]]["median"]), *against, verdict(row)])
    return markdown(["work", "ours, ms", "fastest alternative", "its ms", "ratio", "target"], cells)
