"""`make cuda-build`: build the module with its CUDA kernels, without a GPU, and check what the compiler made of them.

    python -m benchmarks.cuda_build            build, check, compare with the committed tables; exit 1 if any is off
    python -m benchmarks.cuda_build --update   the same, and write the tables (benchmarks/results/cuda/sm*.csv)

It is the build of `ARD_BUILD_CUDA=1 pip install .`, kept in build/cuda, but that this file stands before nvcc there (as
CMake's compiler launcher): it notes seconds, memory and ptxas' report beside each object. Instructions are counted in
the disassembly of the objects. A table's numbers hold for one version of nvcc; under another one they are printed, and
only what `problems` wants is checked.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES = Path(__file__).parent / "results" / "cuda"
BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = ("80", "90a")
# Registers of a multiprocessor, its threads and blocks: the same for compute capabilities 8.0 and 9.0.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
STATIC_SHARED = 48 << 10
MEMORY = 2 << 30  # of one nvcc at most: CMakeLists.txt counts on it
# Column of the table -> instructions it counts.
INSTRUCTIONS = {
    "hmma": r"HMMA\.",
    "hgmma": r"HGMMA\.",
    "ldsm": r"LDSM\.",
    "ldgsts": r"LDGSTS\.[\w.]*\b128\b",
    "utmaldg": r"UTMALDG\.",
    "ldg128": r"LDG\.[\w.]*\b128\b",
    "stg128": r"STG\.[\w.]*\b128\b",
}
# (what "source kernel" starts with, architectures, what such kernels must have; a/b: one of them). LDGSTS, the
# asynchronous copy to shared memory, is a 16-byte load too. RowLayout<.., false> is for inputs that are not aligned.
UNALIGNED = r"RowLayout<\d+, \d+, false>"
REQUIRED = (
    (r"block_causal_attention/sm80", ("80", "90a"), ("hmma", "ldsm", "ldgsts")),
    (r"block_causal_attention/sm90", ("90a",), ("hgmma", "utmaldg")),
    (rf"segment_adaln/(?!.*{UNALIGNED})", ("80", "90a"), ("ldg128/ldgsts", "stg128")),
    (rf"segment_adaln/.*{UNALIGNED}", ("80", "90a"), ("stg128",)),
    (r"history_attention/", ("80", "90a"), ("ldg128", "stg128")),
)


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture: what `make cuda-build` prints, checks and commits."""

    source: str
    kernel: str
    threads: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int  # static; what a launch asks for beyond it is not in the object
    blocks_per_sm: int  # by registers and threads
    hmma: int
    hgmma: int
    ldsm: int
    ldgsts: int
    utmaldg: int
    ldg128: int
    stg128: int


# Building


def observe(command: list[str]) -> int:
    """Run a compiler; write what it took and said to <object>.json, and to stderr what is no report of resources."""
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    if "-o" in command:
        note = {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak, "report": done.stdout}
        Path(command[command.index("-o") + 1] + ".json").write_text(json.dumps(note))
    said = [line for line in done.stdout.splitlines(True) if not re.match(r"ptxas info +:|    \d+ bytes stack", line)]
    sys.stderr.writelines(said)
    return done.returncode


def build() -> str:
    """Build the module; the compiler's version, such as 13.0.88. Ends the program when the build fails."""
    launcher = f"{sys.executable};{Path(__file__).resolve()};--observe"
    cache = BUILD / "objects" / "CMakeCache.txt"
    if cache.is_file() and launcher not in cache.read_text():
        cache.unlink()  # of another Python: CMake reads the variables below when it configures for the first time
    environment = os.environ | {
        "ARD_BUILD_CUDA": "1",
        "ARD_CUDA_ARCHS": ";".join(ARCHITECTURES),
        "ARD_SANITIZE": "0",
        "CUDAFLAGS": "-Xptxas=-v",
        "CMAKE_CUDA_COMPILER_LAUNCHER": launcher,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # cmake and ninja of this Python
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", str(BUILD / "objects")]
    command += ["--build-lib", str(BUILD / "module")]
    if status := subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit(status)
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.M)[1]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", version)[1]


def objects() -> list[tuple[str, Path]]:
    """(source under csrc, object) of each CUDA source; objects of sources that are gone may lie about."""
    found = []
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        name = source.relative_to(ROOT / "csrc").as_posix()
        found += [(name, path) for path in (BUILD / "objects").glob(f"CMakeFiles/*.dir/csrc/{name}.o")]
    return found


def is_hopper(source: str) -> bool:
    """Whether CMakeLists.txt compiles this source for sm_90a alone."""
    return Path(source).name.startswith("sm90")


# Reading what came out


def ptxas_report(text: str, arch: str) -> dict[str, dict[str, int]]:
    """Resources of each kernel compiled for `arch`, by mangled name, from what `ptxas -v` says."""
    found = {}
    for part in re.split(r"ptxas info +: Compiling entry function ", text)[1:]:
        name, target = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        if target != f"sm_{arch}":
            continue
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) .*loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "stack_bytes": int(stack),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    return found


def launch_bounds(elf: str) -> dict[str, int]:
    """Threads of a block at most, by mangled name, from the attributes in `cuobjdump -elf`."""
    found = {}
    for name, attributes in re.findall(r"^\.nv\.info\.(\w+)$(.*?)(?=^\.nv\.info\.|\Z)", elf, re.M | re.S):
        threads = re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\w+\s+Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", attributes)
        if threads:
            x, y, z = (int(n, 16) for n in threads.groups())
            found[name] = x * y * z
    return found


def instruction_counts(sass: str) -> dict[str, dict[str, int]]:
    """How often each kernel has each of INSTRUCTIONS, by mangled name, from `cuobjdump -sass`."""
    found = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.M)[1:]:
        name, code = part.split("\n", 1)
        operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", code, re.M)
        found[name.strip()] = {
            column: sum(bool(re.match(pattern, operation)) for operation in operations)
            for column, pattern in INSTRUCTIONS.items()
        }
    return found


def short_names(mangled: list[str]) -> list[str]:
    """`forward<bfloat16, 72>` of `void ard::(anonymous namespace)::forward<ard::bfloat16, 72>(ard::Params)`."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = []
    for line in text.splitlines():
        line = re.sub(r"\((?:bool|int|unsigned int|long)\)", "", line.replace("(anonymous namespace)::", ""))
        line = re.sub(r"\bard::|_GLOBAL__N__\w+::|\bvoid (?=\w)", "", line)
        names.append(re.sub(r"\([^()]*\)$", "", line).replace("> >", ">>"))
    return names


def _cuobjdump(*arguments: str) -> str:
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def inspect(source: str, path: Path, arch: str) -> tuple[list[Row], list[str]]:
    """The rows of one object for one architecture, and what is wrong with them."""
    report = json.loads(Path(f"{path}.json").read_text())["report"]
    resources = ptxas_report(report, arch)
    expected = arch == "90a" or not is_hopper(source)
    if bool(resources) != expected:
        return [], [f"sm_{arch} {source}: {'no' if expected else 'has'} kernels for this architecture"]
    if not expected:
        return [], []
    bounds = launch_bounds(_cuobjdump("-elf", "-arch", f"sm_{arch}", str(path)))
    counts = instruction_counts(_cuobjdump("-sass", "-arch", f"sm_{arch}", str(path)))
    rows = []
    for name, kernel in zip(resources, short_names(list(resources)), strict=True):
        registers, threads = resources[name]["registers"], bounds.get(name, 1024)
        per_sm = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, BLOCKS)
        rows.append(Row(source, kernel, threads, blocks_per_sm=per_sm, **resources[name], **counts[name]))
    found = [f"sm_{arch} {row.source} {row.kernel}: {problem}" for row in rows for problem in problems(row, arch)]
    if "serialized" in report:
        found.append(f"{source}: ptxas serialises wgmma")
    return sorted(rows, key=lambda row: row.kernel), found


def problems(row: Row, arch: str) -> list[str]:
    """What a kernel must not do."""
    found = []
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes")
    if row.stack_bytes:
        found.append(f"keeps {row.stack_bytes} bytes in local memory")
    if row.shared_bytes > STATIC_SHARED:
        found.append(f"{row.shared_bytes} bytes of static shared memory; the limit is {STATIC_SHARED}")
    if row.blocks_per_sm < 1:
        found.append(f"{row.registers} registers x {row.threads} threads do not fit")
    for pattern, architectures, columns in REQUIRED:
        if re.match(pattern, f"{row.source} {row.kernel}") and arch in architectures:
            missing = [names for names in columns if not any(getattr(row, name) for name in names.split("/"))]
            found += [f"no {names.upper()}" for names in missing]
    return found


def object_problems(source: str, path: Path, note: dict) -> list[str]:
    """What is wrong with a whole object: the memory its compiler took, PTX of the lowest architecture missing."""
    found = []
    if note["peak_bytes"] > MEMORY:
        found.append(
            f"{source}: nvcc took {note['peak_bytes'] / 2**30:.1f} GB; CMakeLists.txt counts on {MEMORY >> 30}"
        )
    present = set(re.findall(r"\.(sm_\w+)\.ptx", _cuobjdump("-lptx", str(path))))
    wanted = set() if is_hopper(source) else {f"sm_{ARCHITECTURES[0]}"}
    if present != wanted:
        found.append(f"{source}: has PTX of {sorted(present)}; expected {sorted(wanted)}")
    return found


def repeated_kernels(reports: dict[str, str]) -> list[str]:
    """Kernels compiled in more than one source, from what ptxas said of each: the linker drops all but one."""
    sources: dict[str, list[str]] = {}
    for source, report in reports.items():
        for name in {name for arch in ARCHITECTURES for name in ptxas_report(report, arch)}:
            sources.setdefault(name, []).append(source)
    repeated = {name: where for name, where in sources.items() if len(where) > 1}
    names = short_names(list(repeated))
    return [f"{name} is compiled in {', '.join(where)}" for name, where in zip(names, repeated.values(), strict=True)]


def module_problems() -> list[str]:
    """The linked module, in a process of its own: it must import without CUDA, and have the kernels' functions."""
    (path,) = (BUILD / "module" / "ard_kernels").glob("_C*.so")
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*(name for name in dir(module.gpu) if not name.startswith("__")))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    if done.returncode:
        return [f"{path.name} does not import: {done.stderr.strip().splitlines()[-1]}"]
    print(f"\n{path.name}: {path.stat().st_size / 2**20:.1f} MB, gpu: {done.stdout.strip()}")
    found = [] if done.stdout.strip() else [f"{path.name}: _C.gpu has no functions"]
    linked = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    return found + [f"{path.name} is linked to {name}" for name in re.findall(r"\S*lib(?:cuda|nv)\S*\.so\S*", linked)]


# Tables


def write_table(arch: str, rows: list[Row], version: str) -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    with (TABLES / f"sm{arch}.csv").open("w", newline="") as file:
        file.write(f"# nvcc {version}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def differences(arch: str, rows: list[Row], version: str) -> list[str]:
    """Rows that are not what the committed table says; none under another version of nvcc than the table's."""
    path = TABLES / f"sm{arch}.csv"
    if not path.is_file():
        return [f"sm_{arch}: no committed table; run with --update"]
    first, *lines = path.read_text().splitlines()
    if first != f"# nvcc {version}":
        print(f"sm_{arch}: the table is of {first[2:]}, this is nvcc {version}: numbers are not compared")
        return []
    committed = {(line["source"], line["kernel"]): line for line in csv.DictReader(lines)}
    found = []
    for row in rows:
        now = {name: str(value) for name, value in asdict(row).items()}
        then = committed.pop((row.source, row.kernel), None)
        if then is None:
            found.append(f"sm_{arch} {row.source} {row.kernel} is not in the table; see --update")
        elif then != now:
            changes = {name: (then.get(name), now[name]) for name in now if then.get(name) != now[name]}
            found.append(f"sm_{arch} {row.source} {row.kernel}: (table, now) {changes}")
    return found + [f"sm_{arch} {' '.join(name)} is in the table only" for name in committed]


def main() -> None:
    from benchmarks.markdown import table  # not where nvcc's launcher would import it: it runs outside the package

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables")
    options = parser.parse_args()
    start = time.perf_counter()
    version = build()
    seconds, compiled = time.perf_counter() - start, objects()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {arch: [pool.submit(inspect, *entry, arch) for entry in compiled] for arch in ARCHITECTURES}
    failures, notes, kernels = module_problems(), {}, 0
    for source, path in compiled:
        notes[source] = json.loads(Path(f"{path}.json").read_text())
        failures += object_problems(source, path, notes[source])
    failures += repeated_kernels({source: note["report"] for source, note in notes.items()})
    lines = [[source, note["seconds"], note["peak_bytes"] >> 20] for source, note in notes.items()]
    print(f"\nnvcc {version}\n{table(['source', 'seconds', 'peak_MB'], lines)}")
    for arch, results in jobs.items():
        rows = [row for job in results for row in job.result()[0]]
        kernels += len(rows)
        print(f"\nsm_{arch}\n{table([field.name for field in fields(Row)], map(astuple, rows))}")
        failures += [problem for job in results for problem in job.result()[1]]
        if options.update:
            write_table(arch, rows, version)
        else:
            failures += differences(arch, rows, version)
    failures = list(dict.fromkeys(failures))
    print(f"\n{kernels} kernels of {len(compiled)} sources, built in {seconds:.0f} s, {len(failures)} problems")
    for failure in failures:
        print(f"  {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--observe"]:
        sys.exit(observe(sys.argv[2:]))
    main()
