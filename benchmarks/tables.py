"""Result rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import markdown
from benchmarks.rows import relative_noise
from testing.cases import BACKENDS

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


def words(candidate: str) -> str:
    return WORDS.get(candidate, candidate.replace("_", " "))


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def work(row: dict) -> str:
    shape = row["shape"].removeprefix(row["op"]).strip()
    backend = f", {row['backend']}" if row.get("backend") in BACKENDS else ""  # a GPU has a row for each of ours
    return f"`{row['op']}` {shape}, {row['direction']}{backend}"


def verdict(row: dict) -> str:
    """The target of the ratio and whether it is met ("within noise": missed by less than the noise), then other goals.

    A row whose goals have no ratio among them shows those alone.
    """
    goals = row.get("targets", [])
    others = [goal for goal in goals if not goal["what"].startswith("times")]
    words = [f"{goal['target']:g} {goal['what']}, {'met' if goal['met'] else 'missed'}" for goal in others]
    if others and len(others) == len(goals):
        return "; ".join(words)
    word = "met" if row["met"] else "missed"
    if not row["met"] and row["ratio"] and row["ratio"] * (1 + relative_noise(row)) >= row["target"]:
        word = "within noise"
    return "; ".join([f"{row['target']:.2f}x, {word}", *words])


def speed_ratio(row: dict) -> str:
    return f"{row['ratio']:.3f}x {words(row['best_peer'])}" if row["best_peer"] else "no alternative ran"


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


def floor_table(rows: Sequence[dict]) -> str:
    """The time that useful work takes at the ceiling measured beside it, and the ratio a kernel at it would have."""
    cells = []
    for row in rows:
        if row.get("fraction_of_measured_ceiling") and row["best_peer"]:
            ours, peer = (row["milliseconds"][name]["median"] for name in (row["ours"], row["best_peer"]))
            floor = ours * row["fraction_of_measured_ceiling"]
            kind = "copy" if row["unit"] == "GB/s" else "matmul"
            share = f"{100 * row['fraction_of_measured_ceiling']:.0f} %"
            cells.append([work(row), kind, milliseconds(floor), milliseconds(ours), share, f"{peer / floor:.2f}x"])
    header = ["work", "ceiling", "floor, ms", "ours, ms", "ours of it", "ratio at the floor"]
    return markdown(header, cells)


def flop_table(entries: Sequence[dict]) -> str:
    """Design section 2: counted FLOPs beside the formula's."""
    cells = [[e["work"], f"{e['counted']:,}", f"{e['analytic']:,}", f"{e['ratio']:.4f}"] for e in entries]
    return markdown(["DiT-XL/2, S = 4", "FLOPs counted", "by formula", "against 4 teacher forwards"], cells)


def growth_table(rows: Sequence[dict]) -> str:
    """Time and memory of ours, and how often they fit into the peer's."""
    cells = []
    for row in rows:
        if row["best_peer"] is None:
            continue
        ours, peer = (row["milliseconds"][name]["median"] for name in (row["ours"], row["best_peer"]))
        memory = [row["peak_bytes"][name] for name in (row["ours"], row["best_peer"])]
        held = [f"{memory[0] / 1e6:.0f}", f"{memory[1] / memory[0]:.2f}x"] if all(memory) else ["not measured", ""]
        cells.append(
            [f"{row['direction']} S={row['S']} L={row['L']}", milliseconds(ours), f"{peer / ours:.2f}x", *held]
        )
    return markdown(["work", "ours, ms", "published design's time", "ours, MB", "its memory"], cells)


def errors_table(entries: Sequence[dict]) -> str:
    """The worst ratio of an op's tensors to plain PyTorch's error, forward / backward, by dtype."""
    worst: dict[tuple[str, str, str], float] = {}
    for e in entries:
        key = (e["op"], e["dtype"], e["direction"])
        worst[key] = max(worst.get(key, 0.0), e["ratio_to_plain"])
    dtypes = ("float32", "bfloat16", "float16")
    ops = dict.fromkeys(e["op"] for e in entries)
    cells = [
        [f"`{op}`", *(" / ".join(f"{worst[op, d, way]:.2f}" for way in ("forward", "backward")) for d in dtypes)]
        for op in ops
    ]
    return markdown(["op", *(f"{d} forward / backward" for d in dtypes)], cells)
