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
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.files import RESULTS, ROOT, write_json
from benchmarks.results import Row, environment, load_rooms, results_folder

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


def cpus(devices: dict[str, Results]) -> dict[str, Results]:
    """CPUs with all their instructions: what ran on a CPU that was kept to some of them has a page of its own."""
    return {
        name: {room: content for room, content in rooms.items() if not content["environment"].get("restrained")}
        for name, rooms in devices.items()
        if on_cpu(rooms)
    }


def cpu_results(devices: dict[str, Results]) -> Results:
    """The newest result file of each room that is of a CPU."""
    found: Results = {}
    for rooms in cpus(devices).values():
        for name, content in rooms.items():
            if name not in found or content["environment"]["date"] > found[name]["environment"]["date"]:
                found[name] = content
    if not found:
        sys.exit("benchmarks.report: no results of a CPU under benchmarks/results; run make bench")
    return found


def provenance(*contents: dict) -> str:
    """Where, when and from which commits."""
    said: dict[str, list[str]] = {}
    for env in (content["environment"] for content in contents):
        where = f"{env['device']}, torch {env['torch']}" + (f", driver {env['driver']}" if env.get("driver") else "")
        when = f"{env['date']}, commit {env['commit'][:7]}{' with changes' if env['dirty'] else ''}"
        said.setdefault(where, []).append(when)
    return "; ".join(f"{where}, {' and '.join(dict.fromkeys(when))}" for where, when in said.items())


def is_headline(row: Row) -> bool:
    """Whether a row is of docs/performance.md's targets, at the model's own sizes."""
    if row.op.startswith("block_causal_attention"):
        on_cpu_in_half = row.dtype == "bfloat16" and row.facts.get("backend") in ("cpu", "torch")
        return (
            "D72" in row.shape
            and " M4 " in row.shape
            and " B16 " not in row.shape
            and "L4 " not in row.shape
            and not on_cpu_in_half
        )
    others = ("adaln_modulate", "gate_residual_adaln", "student_training_step", "student_sampling")
    return row.op in others and "fresh memory" not in row.shape


def headlines(rooms: Results) -> list[dict]:
    """The result files that have headline rows, with those alone."""
    chosen = [content | {"rows": list(filter(is_headline, content["rows"]))} for content in rooms.values()]
    return [content for content in chosen if content["rows"]]


def rows_of(contents: Sequence[dict]) -> list[Row]:
    return [row for content in contents for row in content["rows"]]


def measured(devices: dict[str, Results]) -> str:
    """A table for each GPU, and one for the CPUs."""

    def said(name: str, contents: list[dict]) -> str:
        return f"{provenance(*contents)} ([all rows, plots](docs/results/{name}.md))"

    gpus = {name: headlines(rooms) for name, rooms in devices.items() if not on_cpu(rooms)}
    parts = [f"{said(*gpu)}:\n\n{tables.speed_table(rows_of(gpu[1]))}" for gpu in gpus.items() if gpu[1]]
    machines = {name: used for name, rooms in cpus(devices).items() if (used := headlines(rooms))}
    if machines:
        parts.append("; ".join(said(*machine) for machine in machines.items()) + f":\n\n{beside(machines)}")
    return "\n\n".join(parts)


def beside(machines: dict[str, list[dict]], table: Callable[..., str] = tables.machines_table) -> str:
    return table({used[0]["environment"]["device"]: rows_of(used) for used in machines.values()})


def demo(devices: dict[str, Results]) -> str:
    content = cpu_results(devices)["demo"]
    env = content["environment"]
    said = f"`make demo`, {env['device']}, {env['date']}: {content['seeds']} seeds, equal training, "
    said += f"{content['samples']} held-out noises; the fine-tune's factor is over the student it starts from."
    return f"{said}\n\n{tables.demo_table(content)}"


def counted(devices: dict[str, Results]) -> str:
    """How many cases were counted, and what N = 6 adds by model, steps and mask."""
    content = cpu_results(devices)["flop_overhead"]
    said = f"{content['counted_cases']:,} cases (DiT-S, B, L, XL; S 2 to 8; N 0 to depth; M1 to M4; sampling and "
    said += "training forward): counted = by formula in every one. N = 0 and depth were counted whole, the others by "
    return f"{said}block. FLOPs that N = 6 adds:\n\n{tables.added_flops_table(content['counts'])}"


def of_rooms(devices: dict[str, Results], *rooms: str) -> dict[str, list[dict]]:
    """Result files of those rooms by CPU, where it has any."""
    found = {name: [mine[room] for room in rooms if room in mine] for name, mine in cpus(devices).items()}
    return {name: used for name, used in found.items() if used}


def speed_of(*rooms: str) -> Callable[[dict[str, Results]], str]:
    def table(devices: dict[str, Results]) -> str:
        machines = of_rooms(devices, *rooms)
        return "; ".join(provenance(*used) for used in machines.values()) + f":\n\n{beside(machines)}"

    return table


def right(devices: dict[str, Results]) -> str:
    """A table for each GPU; where there are results of none, for the CPUs."""
    said = "Candidates for attention against fp64, before any is timed. Wrong: the 2-norm of the error is over 4 "
    said += "roundings of 16-bit numbers, 64 of fp32; so many times that. Backward: the gradients of q, k and v."
    rooms = ("block_causal_attention", "segment_attention")
    gpus = [results for results in devices.values() if not on_cpu(results) and any(room in results for room in rooms)]
    for results in gpus or cpus(devices).values():
        if used := [results[room] for room in rooms if room in results]:
            said += f"\n\n{provenance(*used)}:\n\n{tables.right_table(rows_of(used))}"
    return said


KERNELS = ("segment_adaln", "qk_norm_rope", "block_causal_attention", "segment_attention", "history_attention")
BLOCKS: dict[str, Callable[[dict[str, Results]], str]] = {
    "measured": measured,
    "right": right,
    "demo": demo,
    "claim": lambda devices: tables.flop_table(cpu_results(devices)["flop_overhead"]["design_table"]),
    "counted": counted,
    **{room: speed_of(room) for room in (*KERNELS, "rolling_cache", "data_path")},
    "student": speed_of("student_training", "student_compiled", "student_sampling"),
    "overhead": speed_of("flop_overhead", "history_overhead"),
    "floors": lambda devices: beside(of_rooms(devices, *KERNELS), tables.floor_table),
    "attention_memory": lambda devices: tables.attention_memory_table(
        cpu_results(devices)["attention_memory"]["peaks"]
    ),
    "growth": lambda devices: tables.growth_table(cpu_results(devices)["growth"]["rows"]),
    "numerics": lambda devices: tables.errors_table(cpu_results(devices)["numerics"]["errors"]),
}


def refreshed(text: str, devices: dict[str, Results]) -> str:
    """`text` with its blocks made anew; a block of unknown name raises."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise KeyError(f"benchmarks.report: block {name!r}; expected one of {', '.join(BLOCKS)}")
        return f"{begin}{BLOCKS[name](devices)}\n{end}"

    return BLOCK.sub(block, text)


def page(name: str, rooms: Results, plots: dict[str, str]) -> str:
    """docs/results/<device>.md"""
    parts = [f"# {next(iter(rooms.values()))['environment']['device']}", "Made by `python -m benchmarks.report`."]
    parts += [f"![{title}]({name}-{plot}.png)" for plot, title in plots.items()]
    for room, content in rooms.items():
        if rows := content["rows"]:
            parts += [f"## {room}", f"{provenance(content)}.", tables.candidates_table(rows)]
            refused = {(peer, why) for row in rows for peer, why in row.refused.items()}
            if checked := [row for row in rows if "errors" in row.facts]:
                parts += ["Checked before they were timed:", tables.candidate_errors_table(checked)]
            parts += [f"- not timed: {tables.words(peer)}: {why[:200]}" for peer, why in sorted(refused)]
    return "\n\n".join(parts) + "\n"


def take_demo(path: Path) -> None:
    """Write what the README shows of a demo's report.json into this device's results."""
    report = json.loads(path.read_text())
    if report["quick"]:
        sys.exit(f"benchmarks.report: {path} is of `ard demo --quick`; expected the whole demo")
    if report.get("subject", "digits") != "digits":  # which older reports do not say
        sys.exit(f"benchmarks.report: {path} is of {report['subject']}; expected the demo of digits")
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
    write_json(results_folder() / "demo.json", {"environment": environment(), "rows": [], **facts})


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
