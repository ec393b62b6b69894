"""Machine code of a kernel for sm_90 as blocks, loops and ways through them; what an instruction takes of its chip.

The text is that of `nvdisasm -c` on a cubin. What is read of it: opcodes, guards, labels and branches. Not read: the
scheduling of instructions, so no latency, no dependency and no stall is known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from benchmarks.chip import EXP2, MMA_SYNC_SHARE, SCHEDULERS, SHARED_BYTES, TENSOR_FLOPS
from benchmarks.cuda_objects import nvdisasm


class Instruction(NamedTuple):
    """One line: `@!P0 BRA `(.L_x_3)` has guard "!P0", opcode "BRA" and the operands "`(.L_x_3)"."""

    guard: str
    opcode: str
    operands: str

    @property
    def operation(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that a thread moves."""
        sizes = [int(bits) // 8 for bits in re.findall(r"\.[US]?(8|16|32|64|128)\b", self.opcode)]
        return sizes[-1] if sizes else 4


class Cost(NamedTuple):
    """What one warp takes: cycles of its scheduler, of the scheduler's tensor core and of its unit for exp2; cycles of
    the multiprocessor's shared memory and L1; bytes that all lanes write to global memory.
    """

    issue: float = 0
    tensor: float = 0
    exp2: float = 0
    shared: float = 0
    stored: float = 0

    def __add__(self, other: tuple) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * a for a in self))


TENSOR = ("HGMMA", "HMMA")
COPIES = ("LDGSTS", "UTMALDG")
GLOBAL_STORES = ("STG", "UTMASTG")
SHARED_ACCESSES = ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG", "SHFL")


def matrix_shape(instruction: Instruction) -> tuple[int, int, int]:
    """(m, n, k) of a warp's HMMA (m16n8k16: "16816") or of a warpgroup's HGMMA ("64x128x16")."""
    shape = instruction.opcode.split(".")[1]
    if instruction.operation == "HGMMA":
        m, n, k = map(int, shape.split("x"))
        return m, n, k
    known = {"16816": (16, 8, 16), "1688": (16, 8, 8)}
    if shape not in known:
        raise ValueError(f"sass: {instruction.opcode}: expected a shape of {', '.join(known)}")
    return known[shape]


def _shared_cycles(instruction: Instruction) -> float:
    """Cycles of the 128 bytes that shared memory and L1 pass on in a cycle, without bank conflicts.

    A wgmma reads its B, n x k, once for the four warps, and its A, 64 x k, unless A comes from registers.
    """
    operation = instruction.operation
    if operation == "HGMMA":
        m, n, k = matrix_shape(instruction)
        from_registers = re.match(r"R\d+, R\d+, gdesc", instruction.operands)
        return 2 * k * (n if from_registers else n + m) / SHARED_BYTES / 4
    if operation == "SHFL":
        return 1
    if operation in ("LDSM", "STSM"):  # matrices of 8 x 8 halfwords
        count = re.search(r"\.([24])$", instruction.opcode)
        return int(count[1]) if count else 1
    return 32 * instruction.width / SHARED_BYTES


def cost(instruction: Instruction) -> Cost:
    """Of one warp. An instruction whose guard is false is issued all the same. Guarded accesses are not counted: the
    guard may be false, and of `@!PT LDS RZ, [RZ]`, with which the compiler keeps a distance, it always is.
    """
    operation = instruction.operation
    tensor = 0.0
    if operation in TENSOR:
        m, n, k = matrix_shape(instruction)
        rate = TENSOR_FLOPS / SCHEDULERS * (1 if operation == "HGMMA" else MMA_SYNC_SHARE)
        tensor = 2 * m * n * k / (4 if operation == "HGMMA" else 1) / rate
    exp2 = 32 / (EXP2 / SCHEDULERS) if operation == "MUFU" else 0.0
    reaches = not instruction.guard
    shared = _shared_cycles(instruction) if operation in (*SHARED_ACCESSES, "HGMMA") and reaches else 0.0
    return Cost(1, tensor, exp2, shared, 32 * instruction.width if operation == "STG" and reaches else 0)


def flops(instructions: Iterable[Instruction]) -> int:
    """FLOPs of the matrix instructions, of one warp."""
    total = 0
    for instruction in instructions:
        if instruction.operation in TENSOR:
            m, n, k = matrix_shape(instruction)
            total += 2 * m * n * k // (4 if instruction.operation == "HGMMA" else 1)
    return total


def spills(instructions: Iterable[Instruction]) -> int:
    """Accesses of local memory."""
    return sum(instruction.operation in ("LDL", "STL") for instruction in instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop: blocks that `header` dominates and that reach it again."""

    header: int
    body: frozenset[int]


Score = Callable[[list[Instruction]], tuple[float, ...]]


@dataclass(frozen=True)
class Flow:
    """The control flow of a kernel: blocks of instructions by number, in order of address, and what follows each."""

    blocks: list[list[Instruction]]
    following: list[tuple[int, ...]]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for block in blocks for instruction in self.blocks[block]]

    @cached_property
    def _reached(self) -> set[int]:
        """Blocks that the first one leads to. Others are for diverged threads (BRA.DIV), or padding."""
        found, waiting = set(), [0]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += self.following[block]
        return found

    @cached_property
    def _dominators(self) -> list[set[int]]:
        """Blocks on every way from the first one to each; of blocks that nothing reaches: all."""
        everything = set(range(len(self.blocks)))
        found = [{0}, *(set(everything) for _ in self.blocks[1:])]
        before: list[list[int]] = [[] for _ in self.blocks]
        for block, after in enumerate(self.following):
            for other in after:
                before[other].append(block)
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                common = set.intersection(*(found[other] for other in before[block])) if before[block] else everything
                if found[block] != (now := common | {block}):
                    found[block], changed = now, True
        return found

    def _is_back(self, block: int, after: int) -> bool:
        return after in self._dominators[block]

    @cached_property
    def loops(self) -> list[Loop]:
        """In order of their headers' addresses."""
        bodies: dict[int, set[int]] = {}
        for block, after in enumerate(self.following):
            for header in after if block in self._reached else ():
                if self._is_back(block, header):
                    body, waiting = bodies.setdefault(header, {header}), [block]
                    while waiting:
                        inner = waiting.pop()
                        if inner not in body:
                            body.add(inner)
                            waiting += [other for other, next_ in enumerate(self.following) if inner in next_]
        return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]

    def innermost(self, wanted: Callable[[Instruction], bool]) -> list[Loop]:
        """Loops with such an instruction of which no loop inside has one."""
        having = [loop for loop in self.loops if any(map(wanted, self.instructions(loop.body)))]
        return [loop for loop in having if not any(other.body < loop.body for other in having)]

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop around one."""
        outer = [other for other in self.loops if loop.body < other.body]
        return min(outer, key=lambda other: len(other.body)) if outer else None

    def path(
        self, score: Score, loop: Loop | None = None, without: frozenset[int] = frozenset(),
        count: Callable[[list[Instruction]], int] = lambda block: 0, wanted: int = 0,
    ) -> list[int]:  # fmt: skip
        """Blocks of one pass of a loop (of the whole kernel without one) along the way whose scores sum up highest, of
        those whose counts sum up to `wanted`. Loops inside are passed once, or not at all.

        without: blocks that it must not touch.

        Raises:
            ValueError: there is no such way.
        """
        start, region = (loop.header, loop.body) if loop else (0, frozenset(range(len(self.blocks))))
        order, seen, waiting = [], set(), [(start, False)]
        while waiting:  # blocks in postorder
            block, done = waiting.pop()
            if done:
                order.append(block)
            elif block not in seen and block in region and block not in without:
                seen.add(block)
                waiting.append((block, True))
                waiting += [(after, False) for after in self.following[block] if not self._is_back(block, after)]
        best: dict[int, dict[int, tuple[tuple[float, ...], list[int]]]] = {}  # by block, then by the count from it on
        for block in order:
            own, here = score(self.blocks[block]), count(self.blocks[block])
            found = best[block] = {}
            if start in self.following[block] if loop else not self.following[block]:
                found[here] = own, [block]
            for after in self.following[block]:
                for so_far, (value, way) in () if self._is_back(block, after) else best.get(after, {}).items():
                    now = tuple(a + b for a, b in zip(own, value, strict=True))
                    if here + so_far not in found or now > found[here + so_far][0]:
                        found[here + so_far] = now, [block, *way]
        if wanted not in best[start]:
            raise ValueError(f"sass: no way with a count of {wanted}; there are {sorted(best[start])}")
        return best[start][wanted][1]


LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")


def _conditional(instruction: Instruction) -> bool:
    """Whether control may go on behind it: by its guard, or by a predicate among its operands."""
    return bool(instruction.guard) or re.match(r"!?U?P\d", instruction.operands) is not None


def flow_of(text: str) -> Flow:
    """The blocks of one function's disassembly. A branch of diverged threads (BRA.DIV) is taken to go on."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif match := LINE.match(line):
            blocks[-1].append(Instruction(match[1] or "", match[2], match[3]))
            if blocks[-1][-1].operation in ENDS:
                blocks.append([])
    if not blocks[-1]:
        blocks[-1].append(Instruction("", "EXIT", ""))  # where a label behind the last instruction leads
    following = []
    for number, block in enumerate(blocks):
        last, after = block[-1], []
        if last.operation == "BRA" and ".DIV" not in last.opcode:
            after = [labels[name] for name in re.findall(r"`\((\.L_x_\d+)\)", last.operands)]
        if last.operation not in ENDS or _conditional(last) or ".DIV" in last.opcode:
            after.append(number + 1)
        following.append(tuple(dict.fromkeys(block for block in after if block < len(blocks))))
    return Flow(blocks, following)


def disassemble(cubin: Path) -> dict[str, Flow]:
    """The kernels of a cubin by mangled name."""
    parts = re.split(r"^\.text\.(\w+):\n", nvdisasm(cubin), flags=re.M)
    return {name: flow_of(code) for name, code in zip(parts[1::2], parts[2::2], strict=True)}
