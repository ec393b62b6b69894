"""`make cuda-build`: build the module with its CUDA kernels, without a GPU, and check what the compiler made of them.

    python -m benchmarks.cuda_build            build, check, compare with the committed tables; exit 1 if any is off.
                                               Nothing is built where the tables say that they are of these sources
                                               and this nvcc: they would become the same again
    python -m benchmarks.cuda_build --update   build, check, and write the tables (benchmarks/results/cuda/sm*.csv) if
                                               nothing is wrong

It is the build of `ARD_BUILD_CUDA=1 pip install .`, kept in build/cuda, but that observed_nvcc.py stands before nvcc
there and notes seconds, memory and ptxas' report beside each object. Instructions are counted in the disassembly of the
objects. A table's numbers hold for one version of nvcc; under another one they are printed, and only what `problems`
wants is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import build_tables
from benchmarks.cuda_objects import cuobjdump, instruction_counts, launch_bounds, nvcc, ptxas_report, short_names
from benchmarks.markdown import table

ROOT = Path(__file__).resolve().parents[1]
TABLES = Path(__file__).parent / "results" / "cuda"
BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = ("80", "90a")
THREADS = 2048  # of a multiprocessor, compute capabilities 8.0 and 9.0
STATIC_SHARED = 48 << 10
MEMORY = 2 << 30  # of one nvcc at most: CMakeLists.txt counts on it
# (what "source kernel" starts with, architectures, what such kernels must have; a/b: one of them). LDGSTS, the
# asynchronous copy to shared memory, is a 16-byte load too. RowLayout<.., false> is for inputs that are not aligned.
UNALIGNED = r"RowLayout<\d+, \d+, false>"
REQUIRED = (
    (r"block_causal_attention/sm80", ("80", "90a"), ("hmma", "ldsm", "ldgsts")),
    (r"block_causal_attention/sm90", ("90a",), ("hgmma", "utmaldg")),
    (rf"segment_adaln/(?!.*{UNALIGNED})", ("80", "90a"), ("ldg128/ldgsts", "stg128")),
    (rf"segment_adaln/.*{UNALIGNED}", ("80", "90a"), ("stg128",)),
    (r"history_attention/", ("80", "90a"), ("ldg128", "stg128")),
    (r"qk_norm_rope/(?!.*add_blocks)", ("80", "90a"), ("ldg128", "stg128")),
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


def sources() -> str:
    """Digest of all that decides what the CUDA objects are, and how they are judged."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix == ".cu" or path.name.endswith("bindings.cpp")]
    for path in files:  # and of what they include, not of headers that only kernels of the CPU do
        included = [(path.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M)]
        files += [header for header in included if header.is_file() and header not in files]
    judges = [ROOT / "benchmarks" / name for name in ("cuda_build.py", "cuda_objects.py", "observed_nvcc.py")]
    return build_tables.digest(ROOT, [*files, *judges, ROOT / "CMakeLists.txt", ROOT / "setup.py"])


def version_of(nvcc: str) -> str:
    """Such as 13.0.88."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def build() -> str:
    """Build the module; the compiler's version. Ends the program when the build fails."""
    launcher = f"{sys.executable};{Path(__file__).resolve().with_name('observed_nvcc.py')}"
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
    return version_of(re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.M)[1])


def objects() -> dict[str, tuple[str, Path]]:
    """(source under csrc, object) of each CUDA object of the build, by CMake's target and source."""
    text = (BUILD / "objects" / "build.ninja").read_text()
    found = re.findall(r"^build (CMakeFiles/(\S+)\.dir/csrc/(\S+\.cu)\.o):", text, re.M)
    return {f"{target} {source}": (source, BUILD / "objects" / path) for path, target, source in sorted(found)}


def is_hopper(source: str) -> bool:
    """Whether CMakeLists.txt compiles this source for sm_90a alone."""
    return Path(source).name.startswith("sm90")


def inspect(source: str, path: Path, arch: str) -> tuple[list[Row], list[str]]:
    """The rows of one object for one architecture, and what is wrong with them."""
    report = json.loads(Path(f"{path}.json").read_text())["report"]
    resources = ptxas_report(report, arch)
    expected = arch == "90a" or not is_hopper(source)
    if bool(resources) != expected:
        return [], [f"sm_{arch} {source}: {'no' if expected else 'has'} kernels for this architecture"]
    if not expected:
        return [], []
    bounds = launch_bounds(cuobjdump("-elf", "-arch", f"sm_{arch}", str(path)))
    counts = instruction_counts(cuobjdump("-sass", "-arch", f"sm_{arch}", str(path)))
    rows = []
    for name, kernel in zip(resources, short_names(list(resources)), strict=True):
        threads = bounds.get(name, 1024)
        per_sm = build_tables.blocks_per_sm(resources[name]["registers"], threads, THREADS)
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
    present = set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx", str(path))))
    wanted = set() if is_hopper(source) else {f"sm_{ARCHITECTURES[0]}"}
    if present != wanted:
        found.append(f"{source}: has PTX of {sorted(present)}; expected {sorted(wanted)}")
    return found


def repeated_kernels(reports: dict[str, str]) -> list[str]:
    """Kernels compiled in more than one object, from what ptxas said of each: the linker drops all but one."""
    where: dict[str, list[str]] = {}
    for label, report in reports.items():
        for name in {name for arch in ARCHITECTURES for name in ptxas_report(report, arch)}:
            where.setdefault(name, []).append(label)
    repeated = [name for name, labels in where.items() if len(labels) > 1]
    short = short_names(repeated)
    return [f"{name} is compiled in {', '.join(where[long])}" for name, long in zip(short, repeated, strict=True)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables")
    options = parser.parse_args()
    paths = {arch: TABLES / f"sm{arch}.csv" for arch in ARCHITECTURES}
    known = {(build_tables.compiler_of(path), build_tables.sources_of(path)) for path in paths.values()}
    if not options.update and Path(nvcc()).is_file() and known == {(f"nvcc {version_of(nvcc())}", sources())}:
        print(f"the tables are of these sources ({sources()}) and nvcc {version_of(nvcc())}: nothing to build")
        return
    start = time.perf_counter()
    compiler = f"nvcc {build()}"
    seconds, compiled = time.perf_counter() - start, objects()
    notes = {label: json.loads(Path(f"{path}.json").read_text()) for label, (_, path) in compiled.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {arch: [pool.submit(inspect, *entry, arch) for entry in compiled.values()] for arch in ARCHITECTURES}
    failures = module_problems()
    for label, (source, path) in compiled.items():
        failures += object_problems(source, path, notes[label])
    failures += repeated_kernels({label: note["report"] for label, note in notes.items()})
    lines = [[label, note["seconds"], note["peak_bytes"] >> 20] for label, note in notes.items()]
    print(f"\n{compiler}\n{table(['object', 'seconds', 'peak_MB'], lines)}")
    tables = {}
    for arch, results in jobs.items():
        rows = sorted((row for job in results for row in job.result()[0]), key=lambda row: (row.source, row.kernel))
        failures += [problem for job in results for problem in job.result()[1]]
        build_tables.show(f"sm_{arch}", Row, rows)
        if build_tables.compiler_of(paths[arch]) == compiler and not options.update:
            failures += build_tables.differences(paths[arch], rows, ("source", "kernel"))
        elif not options.update:
            print(f"sm{arch}.csv is of {build_tables.compiler_of(paths[arch])}, this is {compiler}: not compared")
        tables[arch] = rows
    failures = list(dict.fromkeys(failures))
    kernels = sum(map(len, tables.values()))
    print(f"\n{kernels} kernels of {len(compiled)} objects, built in {seconds:.0f} s, {len(failures)} problems")
    for failure in failures:
        print(f"  {failure}")
    if failures:
        sys.exit(1)
    if options.update:
        for arch, rows in tables.items():
            build_tables.write(paths[arch], compiler, Row, rows, sources())


if __name__ == "__main__":
    main()
