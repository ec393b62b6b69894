"""Result rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.exact import allowed
from benchmarks.markdown import markdown
from benchmarks.results import Row
from testing.cases import BACKENDS, PACKED, SEGMENT

# What a reader sees instead of a candidate's name.
WORDS = {
    "N0": "the same student, N=0",
    "cat_flash": "SDPA flash, K and V grown by cat",
    "cat_math": "SDPA math, K and V grown by cat",
    "compile_repeat": "torch.compile, rows repeated",
    "compile_rows": "torch.compile, rows broadcast",
    "compile_complex": "torch.compile, complex numbers",
    "compile_pairs": "torch.compile, pairs",
    "eager": "eager PyTorch",
    "eager_complex": "eager PyTorch, complex numbers",
    "eager_pairs": "eager PyTorch, pairs",
    "flex_compiled": "FlexAttention, compiled",
    "flash_attn_loop": "flash-attn, loop over segments",
    "flash_attn_varlen": "flash-attn, packed varlen over gathered keys",
    "flash_attn_3_loop": "FlashAttention-3, loop over segments",
    "flash_attn_3_varlen": "FlashAttention-3, packed varlen over gathered keys",
    "flash_attn_4_loop": "FlashAttention-4, loop over segments",
    "flash_attn_4_sparse": "FlashAttention-4, block-sparse",
    "flash_attn_4_varlen": "FlashAttention-4, packed varlen over gathered keys",
    "flex_flash": "FlexAttention, compiled to FlashAttention-4",
    "flex_max_autotune": "FlexAttention, compiled, max-autotune-no-cudagraphs",
    "four_teacher_forwards": "four teacher forwards",
    "liger": "Liger's norm",
    "magi_attention": "MagiAttention",
    "preallocated_flash": "SDPA flash, K and V copied into memory",
    "preallocated_math": "SDPA math, K and V copied into memory",
    "quack": "quack's norm, compiled modulation",
    "published_compiled": "published design, compiled",
    "published_eager": "published design, eager",
    "sdpa_dense_bool": "SDPA, dense bool mask",
    "sdpa_dense_float": "SDPA, dense float mask",
    "sdpa_loop_cudnn": "SDPA cuDNN, loop over prefixes",
    "sdpa_loop_efficient": "SDPA efficient, loop over prefixes",
    "sdpa_loop_flash": "SDPA flash, loop over prefixes",
    "sdpa_loop_math": "SDPA math, loop over prefixes",
    "torch_varlen": "PyTorch's packed varlen over gathered keys",
}


def words(candidate: str) -> str:
    return WORDS.get(candidate, candidate.replace("_", " "))


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def work(row: Row) -> str:
    shape, backend = row.shape.removeprefix(row.op).strip(), row.facts.get("backend")
    several = backend in BACKENDS or row.dtype == "bfloat16"  # rows for each of ours: see `our_backends`
    on = f", {backend}" if several and backend else ""
    return f"`{row.op}` {shape}, {row.direction}{on}"


def word_of(row: Row) -> str:
    """Whether the ratio meets its target, or misses it; "within noise": by less than the noise."""
    if not row.ratio:
        return "met" if row.met else "missed"
    near = row.ratio * (1 - row.noise) < row.target <= row.ratio * (1 + row.noise)
    return ("met" if row.met else "missed") + ", within noise" * near


def goals_of(row: Row) -> tuple[bool, list[dict]]:
    """Whether the ratio is a goal, as it is but where all goals are others; the others."""
    goals = row.facts.get("targets", [])
    others = [goal for goal in goals if not goal["what"].startswith("times")]
    return not others or len(others) < len(goals), others


def verdict(row: Row) -> str:
    """The target of the ratio and whether it is met, then other goals."""
    of_ratio, others = goals_of(row)
    said = [f"{goal['target']:g} {goal['what']}, {'met' if goal['met'] else 'missed'}" for goal in others]
    return "; ".join([*([f"{row.target:.2f}x, {word_of(row)}"] if of_ratio else []), *said])


def speed_table(rows: Sequence[Row]) -> str:
    """Ours against the fastest alternative of the same run."""
    cells = []
    for row in rows:
        peer = row.best_peer
        against = [words(peer), milliseconds(row.time(peer)), f"{row.ratio:.2f}x"] if peer else ["none", "", ""]
        cells.append([work(row), milliseconds(row.time(row.ours)), *against, verdict(row)])
    return markdown(["work", "ours, ms", "fastest alternative", "its ms", "ratio", "target"], cells)


def machines_table(machines: Mapping[str, Sequence[Row]]) -> str:
    """Ours against the fastest alternative on each machine; bold where a goal is missed."""

    def target(row: Row) -> str:
        of_ratio, others = goals_of(row)
        said = [f"{goal['target']:g} {goal['what']}" for goal in others]
        return "; ".join([*([f"{row.target:.2f}x"] if of_ratio else []), *said])

    def said(row: Row) -> str:
        of_ratio, others = goals_of(row)
        word = word_of(row) if of_ratio else "met"
        word = word if all(goal["met"] for goal in others) else "missed"
        ratio = f"{row.ratio:.2f}x" if row.ratio else "no alternative"
        bold = "**" * word.startswith("missed")
        mark = f"{bold}{ratio}{bold}" + " (within noise)" * word.endswith("within noise")
        return f"{milliseconds(row.time(row.ours))} ms, {mark} {words(row.best_peer or '')}".strip()

    return side_by_side(machines, "target", target, said)


def side_by_side(
    machines: Mapping[str, Sequence[Row]], heading: str, fact: Callable[[Row], str], said: Callable[[Row], str]
) -> str:
    """A line for each work with a fact of it, and what each machine's row of both says."""
    lines: dict[tuple[str, str, int], dict[str, str]] = {}
    for machine, rows in machines.items():
        for row in rows:
            again = 0  # the same against another alternative
            while machine in lines.setdefault((work(row), fact(row), again), {}):
                again += 1
            lines[work(row), fact(row), again][machine] = said(row)
    cells = [[name, text, *(line.get(each, "") for each in machines)] for (name, text, _), line in lines.items()]
    return markdown(["work", heading, *machines], cells)


def candidate_errors_table(rows: Sequence[Row]) -> str:
    """What each candidate gave against fp64, before it was timed: 2-norms, the worst tensor of each."""
    cells = []
    for row in rows:
        for place, (name, error) in enumerate(row.facts.get("errors", {}).items()):
            said = "not timed" if name in row.refused else ""
            cells.append(["" if place else work(row), words(name), f"{error:.1e}", said])
    return markdown(["work", "candidate", "relative error against fp64", ""], cells, left=2)


def rightness(rows: Sequence[Row], candidate: str) -> str:
    """Of all comparisons: wrong in one (by how many times the allowed error), right in one, refused, not installed."""
    checked = [row for row in rows if candidate in row.facts["errors"]]
    if checked:
        worst = max(row.facts["errors"][candidate] / allowed(getattr(torch, row.dtype)) for row in checked)
        return "right" if worst <= 1 else f"**wrong**, {worst:.3g}x"
    reasons = [row.refused[candidate] for row in rows if candidate in row.refused]
    absent = reasons and all(reason.startswith("ModuleNotFoundError") for reason in reasons)
    return "not installed" if absent else "refused" if reasons else ""


def right_table(rows: Sequence[Row]) -> str:
    """Who is right where: candidates for attention by head dim and direction, over all shapes that were compared."""
    ops = ("block_causal_attention", PACKED, SEGMENT)
    compared = [row for row in rows if row.op in ops and "errors" in row.facts]
    places = [(D, way) for D in (64, 72, 128) for way in ("forward", "backward")]
    cells = []
    for name in dict.fromkeys(name for row in compared for name in (*row.facts["errors"], *row.refused)):
        here = [[row for row in compared if (row.facts["width"], row.direction.split("+")[-1]) == at] for at in places]
        cells.append([words(name), *(rightness(each, name) for each in here)])
    return markdown(["candidate", *(f"D {D} {way}" for D, way in places)], cells)


def attention_memory_table(entries: Sequence[dict]) -> str:
    """Peak memory of attention, forward + backward, by tokens, and that of SDPA under a dense mask."""
    cells = []
    for entry in entries:
        ours, dense = (entry["peak_bytes"][name] for name in ("ours", "dense"))
        each = [f"{nbytes / 1e6:.1f}" if nbytes else "not measured" for nbytes in (ours, dense)]
        per_token = f"{ours / entry['tokens']:.0f}" if ours else ""
        cells.append([f"{entry['tokens']:,}", each[0], per_token, each[1]])
    return markdown(["tokens", "ours, MB", "bytes per token", "SDPA, dense mask, MB"], cells)


def floor_table(machines: Mapping[str, Sequence[Row]]) -> str:
    """The time that useful work takes at the ceiling measured beside it, and the ratio a kernel at it would have.

    Not of rows that are far above it: of bf16, PyTorch's matmul is no ceiling on chips that have no products of it.
    """

    def said(row: Row) -> str:
        fraction = row.facts["fraction_of_measured_ceiling"]
        floor = row.time(row.ours) * fraction
        return f"{milliseconds(floor)} ms, {100 * fraction:.0f} %, {row.time(row.best_peer) / floor:.2f}x"

    kept = {
        machine: [row for row in rows if 0 < row.facts.get("fraction_of_measured_ceiling", 0) < 1.5 and row.best_peer]
        for machine, rows in machines.items()
    }
    return side_by_side(kept, "ceiling", lambda row: "copy" if row.facts["unit"] == "GB/s" else "matmul", said)


def flop_table(entries: Sequence[dict]) -> str:
    """Counted FLOPs beside the formula's."""
    cells = [[e["work"], f"{e['counted']:,}", f"{e['analytic']:,}", f"{e['ratio']:.4f}"] for e in entries]
    return markdown(["DiT-XL/2, S = 4", "FLOPs counted", "by formula", "against 4 teacher forwards"], cells)


def growth_table(rows: Sequence[Row]) -> str:
    """Time and memory of ours, and how often they fit into the peer's."""
    cells = []
    for row in rows:
        if row.best_peer is None:
            continue
        ours, peer = row.time(row.ours), row.time(row.best_peer)
        memory = [row.facts["peak_bytes"][name] for name in (row.ours, row.best_peer)]
        held = [f"{memory[0] / 1e6:.0f}", f"{memory[1] / memory[0]:.2f}x"] if all(memory) else ["not measured", ""]
        point = f"{row.direction} S={row.facts['S']} L={row.facts['L']}"
        cells.append([point, milliseconds(ours), f"{peer / ours:.2f}x", *held])
    return markdown(["work", "ours, ms", "published design's time", "ours, MB", "its memory"], cells)


def errors_table(entries: Sequence[dict]) -> str:
    """The worst ratio of an op's tensors to plain PyTorch's error, forward / backward, by dtype."""
    worst: dict[tuple[str, str, str], float] = {}
    for e in entries:
        key = (e["op"], e["dtype"], e["direction"])
        worst[key] = max(worst.get(key, 0.0), e["ratio_to_plain"])
    dtypes, ways = ("float32", "bfloat16", "float16"), ("forward", "backward")
    cells = [
        [f"`{op}`", *(" / ".join(f"{worst[op, d, way]:.2f}" for way in ways) for d in dtypes)]
        for op in dict.fromkeys(e["op"] for e in entries)
    ]
    return markdown(["op", *(f"{d} forward / backward" for d in dtypes)], cells)


def candidates_table(rows: Sequence[Row]) -> str:
    """Every candidate of every row, fastest first."""
    cells = []
    for row in rows:
        for place, name in enumerate(sorted(row.milliseconds, key=row.time)):
            mark, time = "**ours**" if name == row.ours else words(name), row.milliseconds[name]
            spread = f"{milliseconds(time['p20'])} to {milliseconds(time['p80'])}"
            cells.append(["" if place else work(row), mark, milliseconds(time["median"]), spread])
    return markdown(["work", "candidate", "median, ms", "p20 to p80"], cells, left=2)


def added_flops_table(counts: Sequence[dict]) -> str:
    """FLOPs that N = 6 adds to sampling, by model, steps and mask."""
    added = {
        (c["model"], c["S"], c["mask"]): 100 * c["ratio"] - 100
        for c in counts
        if c["N"] == 6 and c["work"] == "sampling"
    }
    cells = [
        [model, str(S), *(f"{added[model, S, mask]:.4f} %" for mask in ("M2", "M3", "M4"))]
        for model in dict.fromkeys(model for model, _, _ in added)
        for S in (2, 4, 8)
    ]
    return markdown(["model", "S", "M2", "M3", "M4"], cells)


def demo_table(content: dict) -> str:
    """The demo's scores: the teacher's, then those of the students by history layers."""
    digits = {"frechet_to_teacher": 2, "endpoint_mse": 4, "frechet_to_real": 1}
    cells = [[f"teacher, {content['teacher_steps']} steps", "", "", f"{content['teacher_frechet_to_real']:.1f}"]]
    for name, score in content["summary"]["scores"].items():
        layers, tuned = name.removeprefix("N=").removesuffix(" + GAN"), name.endswith("+ GAN")
        what = "no history" if layers == "0" else f"history in {layers} of {content['depth']} layers"
        values = {metric: f"{score[metric]['mean']:.{places}f}" for metric, places in digits.items()}
        if ratios := content["summary"]["times_smaller"].get(name):
            for metric in ("frechet_to_real",) if tuned else ("frechet_to_teacher", "endpoint_mse"):
                values[metric] += f" ({ratios[metric]['mean']:.1f}x less)"
        cells.append([f"{content['steps']} steps, {what}{', GAN fine-tune' if tuned else ''}", *values.values()])
    header = ["sampler", "Frechet distance to the teacher's images", "error to the teacher's endpoint (MSE)"]
    return markdown([*header, "Frechet distance to real digits"], cells)
