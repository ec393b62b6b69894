"""What the launches of the adaLN family and of qk_norm_rope take of a Hopper GPU: the compiled loop over tokens, times
the tokens.

Of the ways through the loop that copy all inputs and store all outputs, the one with the fewest instructions is
counted. The CUDA kernels of adaLN look at dtypes at run time: stores of both stand in the code, and are issued, one of
them switched off. Those of qk_norm_rope branch: `rope_way`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ard_kernels.common import extension, tuning
from ard_kernels.common.arguments import NORM_EPS
from ard_kernels.qk_norm_rope import op as norm_rope
from ard_kernels.qk_norm_rope.cuda import THREADS as ROPE_THREADS
from ard_kernels.qk_norm_rope.spec import Rule, empty_statistics
from ard_kernels.segment_adaln import op as adaln
from ard_kernels.segment_adaln.chunks import chunk_tokens
from ard_kernels.segment_adaln.cuda import TOKENS
from benchmarks.aot import FUNCTIONS, compiled_by
from benchmarks.chip import MULTIPROCESSORS
from benchmarks.cuda_objects import nvcc_cubin, short_names
from benchmarks.launches import ARCHITECTURE, Launch, total
from benchmarks.ops import Job
from benchmarks.sass import Cost, Flow, Instruction, Loop, disassemble
from testing import emulator
from testing.cases import Case, adaln_inputs

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def _count(block: list[Instruction], operation: str) -> int:
    return sum(instruction.operation == operation for instruction in block)


def _store_site(block: list[Instruction]) -> int:
    """1 where a vector of an output is stored."""
    return int(any(instruction.operation == "STG" and instruction.width > 4 for instruction in block))


def token_cost(flow: Flow, sites: int, copies: int | None, inner_passes: int) -> tuple[Cost, Cost]:
    """What a warp's pass of the loop over tokens takes, and the rest of the kernel.

    sites: blocks that store outputs, of one pass; copies: asynchronous ones of one pass, None for a kernel that loads
    into registers. inner_passes: of the loops inside, which add up what the row's warps have, each read by all lanes.
    """
    having = flow.innermost(lambda i: i.operation == "STG" and i.width > 4)
    loop = max(having, key=lambda each: len(flow.instructions(each.body)))
    if copies is None:
        way = flow.path(lambda block: (_count(block, "LDG"), _store_site(block), -len(block)), loop)
    else:
        way = flow.path(
            lambda block: (-len(block),), loop,
            count=lambda block: 1000 * _store_site(block) + _count(block, "LDGSTS"), wanted=1000 * sites + copies,
        )  # fmt: skip
    token = total(flow.instructions(way))
    for other in flow.loops:
        if other.body < loop.body:
            inside = flow.instructions(other.body)
            once = Cost(issue=len(inside), shared=_count(inside, "LDS"))
            token += once * (inner_passes - (other.header in way))
    whole = flow.path(lambda block: (_count(block, "LDG") + _count(block, "LDGSTS"), _store_site(block), -len(block)))
    return token, total(flow.instructions(number for number in whole if number not in loop.body))


# Compiled kernels


def flow_of_triton(compiled: Any) -> Flow:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (flow,) = disassemble(path).values()
    return flow


@cache
def triton_kernel(case: Case, direction: str) -> tuple[Flow, dict[str, int]]:
    """The kernel that passes over the tokens, as a call on this case would compile it, and its constants."""
    kernel = f"adaln_{direction}"
    small = Case(case.op, 1, case.lengths, C=case.C, dtype=case.dtype, row_dtype=case.row_dtype, seam=case.seam)
    named = dict(zip(small.takes, adaln_inputs(small, torch.device("cpu")), strict=True))
    x, branch, gate, shift, scale, weight, bias = (
        named[name].detach() if name in named else None
        for name in ("x", "branch", "gate", "shift", "scale", "weight", "bias")
    )  # fmt: skip
    norm = None if case.op == "gate_residual" else "layer"
    lengths = [case.lengths[0]]
    config = tuning.shipped(ARCHITECTURE)[tuning.key(kernel, case.dtype, case.C, lengths[0])]

    def run() -> None:
        if direction == "forward":
            adaln.adaln_op(x, branch, gate, shift, scale, weight, bias, lengths, norm, NORM_EPS, case.dtype, "triton")
            return
        statistics = torch.empty(x.shape[:2]) if norm else None
        grad_h, grad_y = (x if branch is not None else None), (x if norm else None)
        saved = (x if norm else None), (branch if gate is not None else None), gate, scale, weight, bias
        wanted = [row is not None for row in (gate, shift, scale, weight, bias)]
        adaln.backward_op(grad_h, grad_y, *saved, statistics, statistics, lengths, case.row_dtype, wanted, "triton")

    compiled = compiled_by(run, FUNCTIONS[kernel], ARCHITECTURE, config)
    binary, options = next((binary, options) for name, binary, options in compiled if name == direction)
    return flow_of_triton(binary), options | {"TOKENS": config["TOKENS"]}


@cache
def cuda_flows(room: str, direction: str) -> dict[str, Flow]:
    """The kernels of a room's forward.cu or backward.cu by short name."""
    flows = disassemble(nvcc_cubin(SOURCES / room / f"{direction}.cu"))
    return dict(zip(short_names(list(flows)), flows.values(), strict=True))


@cache
def geometry(channels: int, direction: str) -> tuple[int, int, int]:
    """(elements of a thread, threads of a row, rows of a block) as the CUDA kernels choose them."""
    module = extension.emulated or emulator.load()
    return module.adaln_geometry(channels, direction == "backward")


@cache
def rope_geometry(heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """(units of a row, rows of a warp, heads of a thread, warps of a block) as the CUDA kernels choose them."""
    module = extension.emulated or emulator.load()
    return module.qk_norm_rope_geometry(heads, head_dim)


def adaln_launch(job: Job, backend: str) -> Launch:
    """The pass over the tokens; the sums of the row gradients after it count by their bytes alone."""
    case, direction = job.case, job.direction
    tokens, takes = case.B * case.tokens, case.takes
    has_norm, has_branch = case.op != "gate_residual", "branch" in takes
    outputs = has_norm + has_branch
    if backend == "triton":
        flow, options = triton_kernel(case, direction)
        warps, rows, most = options["num_warps"], options["ROWS"], options["TOKENS"]
        chunk = chunk_tokens(case.tokens, case.B, most, MULTIPROCESSORS)
        token, program = token_cost(flow, outputs, None, 1)
    else:
        elements, threads, _ = geometry(case.C, direction)
        vector = 4 if direction == "backward" and elements == 16 else 8
        inputs = 1 + has_branch if direction == "forward" else 2 * has_norm + has_branch * (1 + ("gate" in takes))
        of_norm = not has_norm or ({"shift", "scale"} <= set(takes) and "weight" not in takes)
        plain = of_norm and ("gate" in takes or not has_branch)
        flags = f"{has_branch}, {has_norm}".lower()
        kernel = f"adaln_{direction}<RowLayout<{vector}, {elements}, true>, {flags}, (Rows){int(not plain)}>"
        warps, rows, chunk, vectors = threads // 32, 1, TOKENS[direction], elements // vector
        token, program = token_cost(
            cuda_flows("segment_adaln", direction)[kernel], outputs * vectors, inputs * vectors, warps
        )
    chunks = case.B * sum(-(-length // chunk) for length in case.lengths)
    amounts = token * (warps * tokens / rows) + program * (warps * chunks)
    nbytes = job.op.work(case, direction)[1]
    if direction == "backward":  # partial sums of the chunks, written and read
        nbytes += 2 * 4 * case.C * chunks * sum(name in takes for name in ("gate", "shift", "scale"))
    name = f"{'Triton' if backend == 'triton' else 'CUDA C++'} {direction}"
    return Launch(name, amounts, nbytes, nbytes, 1.0)


# qk_norm_rope


def rope_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (1, H, T, D) as a section of a packed projection, its weight, and a table (1, T, 1, D / 2), on the CPU."""
    x = torch.empty(1, case.tokens, 3, case.H, case.D, dtype=case.dtype)[:, :, 0].transpose(1, 2)
    weight = torch.empty(case.H * case.D if case.over == "all" else case.D)
    return x, weight, torch.empty(1, case.tokens, 1, case.D // 2)


@cache
def triton_rope(case: Case, direction: str) -> tuple[Flow, dict[str, int]]:
    """The kernel that passes over the tokens, and its constants."""
    kernel, (x, weight, table) = f"rope_{direction}", rope_inputs(case)
    rule = Rule("rms", case.over == "all", False, NORM_EPS)
    config = tuning.shipped(ARCHITECTURE)[tuning.key(kernel, case.dtype, case.width, 0)]

    def run() -> None:
        parameters = weight, None, None, None, table, table
        if direction == "forward":
            norm_rope.forward(x, *parameters, *rule, "triton")
        else:
            norm_rope.backward(x, x, *parameters, *empty_statistics(x, rule), *rule, "triton")

    compiled = compiled_by(run, {direction}, ARCHITECTURE, config)
    ((_, binary, options),) = compiled
    return flow_of_triton(binary), options | {"BLOCKS": config["BLOCKS"]}


def rope_way(flow: Flow, loop: Loop, direction: str, over: str, heads_each: int) -> list[int]:
    """The way of an RMSNorm with fp32 weight and tables, pairs side by side, through the CUDA kernel's loop.

    Of a head of a thread: 16 bytes of x (and dy), two of the weight, one of cos and one of sin; forward a reciprocal
    root; the sum over a head is a shuffle in a loop and one behind it, over all heads five, and a loop that adds up
    what the warps left in shared memory.
    """

    def other(block: list[Instruction]) -> bool:
        """Pairs half a head apart, which change places in shared memory; 16-bit weights and tables."""
        swaps = _count(block, "STS") and not _count(block, "BAR")
        return bool(swaps) or any(i.operation == "LDG" and i.width in (2, 8) for i in block)

    def count(block: list[Instruction]) -> int:
        loads = sum(i.operation == "LDG" and i.width == 16 for i in block)
        roots = sum(i.opcode == "MUFU.RSQ" for i in block)
        return loads + 100 * _count(block, "LDS") + 10_000 * _count(block, "SHFL") + 1_000_000 * roots

    backward = direction == "backward"
    wanted = heads_each * (5 + backward + 1_000_000 * (not backward))
    wanted += 100 + 50_000 if over == "all" else 20_000 * heads_each
    without = frozenset(number for number in loop.body if other(flow.blocks[number]))
    return flow.path(lambda block: (_store_site(block), -len(block)), loop, without, count, wanted)


def cuda_rope_cost(flow: Flow, case: Case, direction: str) -> tuple[Cost, Cost]:
    """As `token_cost`, of a kernel of csrc/qk_norm_rope."""
    units, _, heads_each, warps = rope_geometry(case.H, case.D)
    having = flow.innermost(lambda i: i.operation == "STG" and i.width == 16)
    loop = max(having, key=lambda each: len(flow.instructions(each.body)))
    way = rope_way(flow, loop, direction, case.over, heads_each)
    token = total(flow.instructions(way))
    passes = warps if case.over == "all" else (units - 1).bit_length()  # of the loop that adds up
    for other in flow.loops:
        if other.body < loop.body and other.header in way:
            token += total(flow.instructions(other.body)) * (passes - 1)
    whole = flow.path(lambda block: (_store_site(block), -len(block)))
    return token, total(flow.instructions(number for number in whole if number not in loop.body))


def rope_launch(job: Job, backend: str) -> Launch:
    """The pass over the tokens of q, or of k: a call has one for each. Sums of dweight count by their bytes alone."""
    case, direction = job.case, job.direction
    tokens = case.B * case.tokens
    if backend == "triton":
        flow, options = triton_rope(replace(case, B=1), direction)
        warps, most = options["num_warps"], MULTIPROCESSORS * options["BLOCKS"]
        token, program = token_cost(flow, 1, None, 1)
    else:
        _, _, heads_each, warps = rope_geometry(case.H, case.D)
        most = MULTIPROCESSORS * max(1, ROPE_THREADS[direction] // (32 * warps))
        kernel = f"norm_rope_{direction}<bfloat16, {heads_each}{', false' * (direction == 'backward')}>"
        token, program = cuda_rope_cost(cuda_flows("qk_norm_rope", direction)[kernel], case, direction)
    programs = min(tokens, most)
    nbytes = job.op.work(case, direction)[1] / 2 + 4 * tokens * (1 if case.over == "all" else case.H)  # and rstd
    if direction == "backward":
        nbytes += 2 * 4 * programs * (case.width if case.over == "all" else case.D)
    amounts = token * (warps * tokens) + program * (warps * programs)
    return Launch(f"{'Triton' if backend == 'triton' else 'CUDA C++'} {direction}", amounts, nbytes, nbytes, 1.0)
