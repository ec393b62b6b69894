"""What nvcc's report and the disassembly of its objects say of each kernel, by mangled name."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

CUBINS = Path(__file__).resolve().parents[1] / "build" / "cubins"

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


def _triton_tool(name: str, *arguments: str) -> str:
    """What a program says that comes with Triton."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def cuobjdump(*arguments: str) -> str:
    return _triton_tool("cuobjdump", *arguments)


def nvdisasm(cubin: Path) -> str:
    """The code with labels, `nvdisasm -c`."""
    return _triton_tool("nvdisasm", "-c", str(cubin))


def nvcc() -> str:
    """The compiler on PATH, or where CUDA is installed by default."""
    return shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def nvcc_cubin(source: Path, *options: str, arch: str = "90a") -> Path:
    """Compile one source with the options of CMakeLists.txt, for one chip; in build/cubins until its room changes."""
    headers = source.parents[1]
    rooms = source.parent, headers / "common"
    newest = max(path.stat().st_mtime for room in rooms for path in room.iterdir())
    name = "-".join([source.parent.name, source.stem, f"sm{arch}", *options]).replace("=", "-")
    cubin = CUBINS / f"{name}.cubin"
    if not cubin.is_file() or cubin.stat().st_mtime < newest:
        cubin.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{headers}", *options]
        target = f"--generate-code=arch=compute_{arch},code=sm_{arch}"
        subprocess.run([nvcc(), "-cubin", target, *flags, str(source), "-o", str(cubin)], check=True)
    return cubin
