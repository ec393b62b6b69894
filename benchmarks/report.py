"""`python -m benchmarks.report`: the result files as tables and plots.

Refreshes the blocks between `<!-- report: NAME -->` and `<!-- end of report -->` in README.md and docs/performance.md,
and writes docs/results/<device>.md with its plots. `--check` writes nothing and fails where a block differs from the
result files. `--demo runs/demo/report.json` first takes over what `make demo` scored.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.rows import RESULTS, ROOT, is_comparison, load_rooms, results_folder, row_key, write_room
from benchmarks.tables import (
    errors_table,
    floor_table,
    flop_table,
    growth_table,
    milliseconds,
    speed_table,
    words,
    work,
)

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
PAGES = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end of report -->)", re.DOTALL)
NOT_DEVICES = ("aot", "cuda")  # tables of what compilers made

Results = dict[str, dict]  # by room


def load_devices(folder: Path = RESULTS) -> dict[str, Results]:
    """Result files of every device, GPUs first."""
    found = {}
    for device in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in NOT_DEVICES):
        if rooms := load_rooms(device):
            found[device.name] = rooms
    return dict(sorted(found.items(), key=lambda item: on_cpu(item[1])))


def on_cpu(rooms: Results) -> bool:
    return all(content["environment"].get("driver") is None for content in rooms.values())


def cpu_results(devices: dict[str, Results]) -> Results:
    """The newest results of a CPU."""
    newest = {
        max(c["environment"]["date"] for c in rooms.values()): rooms for rooms in devices.values() if on_cpu(rooms)
    }
    if not newest:
        sys.exit("benchmarks.report: no results of a CPU under benchmarks/results; run make bench")
    return newest[max(newest)]


def timed_rows(rooms: Results, *names: str) -> list[dict]:
    """Rows of the named rooms, of all if none is named; one of each, where a GPU's stages measured what a room did."""
    contents = [rooms[name] for name in names] if names else rooms.values()
    rows = [row for content in contents for row in content["rows"] if is_comparison(row)]
    return list({row_key(row): row for row in rows}.values())


def provenance(*contents: dict) -> str:
    """Where, when and from which commit: each that differs."""
    said = []
    for env in (content["environment"] for content in contents):
        where = f"{env['device']}, torch {env['torch']}" + (f", driver {env['driver']}" if env.get("driver") else "")
        said.append(f"{where}, {env['date']}, commit {env['commit'][:7]}{' with changes' if env['dirty'] else ''}")
    return "; ".join(dict.fromkeys(said))


def is_headline(row: dict) -> bool:
    """Whether a row is one of design section 6's, at the model's own sizes."""
    if row["op"].startswith("block_causal_attention"):
        return "D72" in row["shape"] and " M4 " in row["shape"] and "L4 " not in row["shape"]
    return row["op"] in ("adaln_modulate", "gate_residual_adaln", "student_training_step", "student_sampling")


def measured(devices: dict[str, Results]) -> str:
    """One table per device."""
    parts = []
    for name, rooms in devices.items():
        rows = [row for row in timed_rows(rooms) if is_headline(row)]
        if rows:
            used = [content for content in rooms.values() if any(row in rows for row in content["rows"])]
            parts.append(f"{provenance(*used)} ([all rows, plots](docs/results/{name}.md)):\n\n{speed_table(rows)}")
    return "\n\n".join(parts)


def demo(devices: dict[str, Results]) -> str:
    content = cpu_results(devices)["demo"]
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
    env = content["environment"]
    said = f"`make demo`, {env['device']}, {env['date']}: {content['seeds']} seeds, equal training, "
    said += f"{content['samples']} held-out noises; the fine-tune's factor is over the student it starts from."
    return f"{said}\n\n{markdown([*header, 'Frechet distance to real digits'], cells)}"


def claim(devices: dict[str, Results]) -> str:
    return flop_table(cpu_results(devices)["flop_overhead"]["design_table"])


def counted(devices: dict[str, Results]) -> str:
    """How many cases were counted, and what N = 6 adds by model, steps and mask."""
    content = cpu_results(devices)["flop_overhead"]
    added = {
        (c["model"], c["S"], c["mask"]): 100 * c["ratio"] - 100
        for c in content["counts"]
        if c["N"] == 6 and c["work"] == "sampling"
    }
    models = dict.fromkeys(model for model, _, _ in added)
    cells = [
        [model, str(S), *(f"{added[model, S, mask]:.4f} %" for mask in ("M2", "M3", "M4"))]
        for model in models
        for S in (2, 4, 8)
    ]
    said = f"{content['counted_cases']:,} cases (DiT-S, B, L, XL; S 2 to 8; N 0 to depth; M1 to M4; sampling and "
    said += "training forward): counted = by formula in every one. N = 0 and depth were counted whole, the others by "
    said += "block. FLOPs that N = 6 adds:\n\n"
    return said + markdown(["model", "S", "M2", "M3", "M4"], cells)


def speed_of(*rooms: str) -> Callable[[dict[str, Results]], str]:
    def table(devices: dict[str, Results]) -> str:
        found = cpu_results(devices)
        return f"{provenance(*(found[room] for room in rooms))}:\n\n{speed_table(timed_rows(found, *rooms))}"

    return table


BLOCKS: dict[str, Callable[[dict[str, Results]], str]] = {
    "measured": measured,
    "demo": demo,
    "claim": claim,
    "counted": counted,
    "segment_adaln": speed_of("segment_adaln"),
    "block_causal_attention": speed_of("block_causal_attention"),
    "history_attention": speed_of("history_attention"),
    "student": speed_of("student_training", "student_sampling"),
    "overhead": speed_of("flop_overhead"),
    "data_path": speed_of("data_path"),
    "floors": lambda devices: floor_table(
        timed_rows(cpu_results(devices), "segment_adaln", "block_causal_attention", "history_attention")
    ),
    "growth": lambda devices: growth_table(timed_rows(cpu_results(devices), "growth")),
    "numerics": lambda devices: errors_table(cpu_results(devices)["numerics"]["errors"]),
}


def refreshed(text: str, devices: dict[str, Results]) -> str:
    """`text` with its blocks made anew; a block of unknown name raises."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise KeyError(f"benchmarks.report: block {name!r}; expected one of {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name](devices)}\n{end}"

    return BLOCK.sub(block, text)


def candidates_table(rows: list[dict]) -> str:
    """Every candidate of every row, fastest first."""
    cells = []
    for row in rows:
        times = sorted(row["milliseconds"].items(), key=lambda item: item[1]["median"])
        for name, time in times:
            mark = "**ours**" if name == row["ours"] else words(name)
            spread = f"{milliseconds(time['p20'])} to {milliseconds(time['p80'])}"
            cells.append([work(row) if name == times[0][0] else "", mark, milliseconds(time["median"]), spread])
    return markdown(["work", "candidate", "median, ms", "p20 to p80"], cells, left=2)


def page(name: str, rooms: Results, plots: dict[str, str]) -> str:
    """docs/results/<device>.md"""
    parts = [f"# {next(iter(rooms.values()))['environment']['device']}", "Made by `python -m benchmarks.report`."]
    parts += [f"![{title}]({name}-{plot}.png)" for plot, title in plots.items()]
    for room, content in rooms.items():
        rows = timed_rows({room: content})
        if not rows:
            continue
        parts += [f"## {room}", f"{provenance(content)}.", candidates_table(rows)]
        refused = {(peer, why) for row in rows for peer, why in row["refused"].items()}
        parts += [f"- not timed: {words(peer)}: {why[:200]}" for peer, why in sorted(refused)]
    return "\n\n".join(parts) + "\n"


def take_demo(path: Path) -> None:
    """Write what the README shows of a demo's report.json into this device's results."""
    report = json.loads(path.read_text())
    if report["quick"]:
        sys.exit(f"benchmarks.report: {path} is of `ard demo --quick`; expected the whole demo")
    settings = report["settings"]
    facts = {
        "summary": report["summary"],
        "seeds": len(settings["demo"]["seeds"]),
        "samples": settings["demo"]["evaluation"]["count"],
        "depth": settings["model"]["depth"],
        "steps": len(settings["trajectories"]["keep"]),
        "teacher_steps": settings["trajectories"]["sampling_steps"],
        "teacher_frechet_to_real": report["teacher"]["frechet_to_real"],
    }
    print(f"wrote {write_room(results_folder(), 'demo', [], facts)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is out of date")
    parser.add_argument("--demo", type=Path, help="report.json of a demo to take over")
    options = parser.parse_args(arguments)
    if options.demo:
        take_demo(options.demo)
    devices = load_devices()
    documents = {path: refreshed(path.read_text(), devices) for path in DOCUMENTS}
    if options.check:
        stale = [path.name for path, text in documents.items() if text != path.read_text()]
        print(f"out of date: {', '.join(stale)}" if stale else "the documents agree with the result files")
        return 1 if stale else 0
    from benchmarks.plots import draw

    PAGES.mkdir(exist_ok=True)
    for name, rooms in devices.items():
        documents[PAGES / f"{name}.md"] = page(name, rooms, draw(name, rooms, PAGES))
    for path, text in documents.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
