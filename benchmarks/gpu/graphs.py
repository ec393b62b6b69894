"""CUDA graphs and torch.compile: what they run must equal eager."""

from __future__ import annotations

import torch

from ard_kernels import adaln_modulate, block_causal_attention, gate_residual_adaln
from benchmarks.gpu import checklist
from benchmarks.gpu.correctness import difference
from benchmarks.gpu.record import COMPILE_LIMIT, Record
from benchmarks.measure import relative
from testing import cases
from testing.cases import OPS, Case


def forward_and_backward(case: Case, backend: str, inputs, grad_outputs, cache) -> list[torch.Tensor]:
    if case.op == "history_attention":
        return [cases.run_history(case, inputs, backend, cache)]
    outputs = cases.run_ours(case, inputs, backend)
    return [*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs)]


def replayed(run, refill, device: torch.device) -> list[torch.Tensor]:
    """Outputs of a graph of `run` replayed after `refill` changed its inputs; on the CPU of a second plain call."""
    if device.type == "cpu":
        run()
        refill()
        return run()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    refill()
    graph.replay()
    torch.cuda.synchronize(device)
    return outputs


def check_graph(case: Case, backend: str, device: torch.device) -> bool:
    """Capture forward and backward after one warm-up call, replay on fresh inputs: bit-equal to eager."""
    inputs, fresh = (cases.make_inputs(case, device) for _ in range(2))
    grad_outputs = [torch.randn_like(y) for y in cases.run_ours(case, inputs, backend)]
    cache = cases.new_cache(case, device) if case.op == "history_attention" else None

    def refill():
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)

    got = replayed(lambda: forward_and_backward(case, backend, inputs, grad_outputs, cache), refill, device)
    expected = forward_and_backward(case, backend, fresh, grad_outputs, cache)
    return not bool(difference([x.contiguous() for x in got], [x.contiguous() for x in expected]))


def layer(x, branch, rows, qkv_weight, L: int, H: int, backend: str):
    """adaln_modulate -> attention -> gate_residual_adaln, as in a block of the student."""
    shift, scale, gate, shift2, scale2, _ = rows.chunk(6, -1)
    shared = {"segment_length": L, "backend": backend}
    y = adaln_modulate(x, shift, scale, **shared) + branch
    q, k, v = (y @ qkv_weight).unflatten(-1, (3, H, -1)).unbind(2)
    attended = block_causal_attention(q, k, v, layout="bthd", **shared).flatten(2)
    return gate_residual_adaln(x, attended, gate, shift2, scale2, **shared)


def check_compiled_layer(backend: str, device: torch.device) -> dict[str, float]:
    """Relative 2-norm differences of the compiled layer's outputs and gradients to eager's, the largest of 3 calls."""
    L, S, H, D = (16, 2, 1, 64) if device.type == "cpu" else (256, 4, 16, 72)
    C, dtype = H * D, torch.bfloat16
    how = {"backend": "aot_eager"} if device.type == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(layer, fullgraph=True, **how)
    worst: dict[str, float] = {}
    for _ in range(3):  # warm-up, recording and replay of the graph
        shapes = [(2, S * L, C), (2, S * L, C), (2, S, 6 * C), (C, 3 * C)]
        inputs = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        inputs = [(x * 0.05 if x.dim() == 2 else x).requires_grad_() for x in inputs]
        grad_outputs = [torch.randn(2, S * L, C, device=device).to(dtype) for _ in range(2)]
        results = []
        for function in (layer, compiled):
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            outputs = function(*inputs, L, H, backend)
            results.append([x.clone() for x in (*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs))])
        names = ["h", "y", "dx", "dbranch", "drows", "dweight"]
        for label, expected, got in zip(names, *results, strict=True):
            worst[label] = max(worst.get(label, 0.0), relative(got, expected))
    return worst


def graphs(record: Record) -> str:
    """Every op in a CUDA graph, then a compiled layer."""
    device = record.device
    for op in OPS:
        case = cases.tiny_case(op) if record.dry else Case(op, 4, (256,) * 4)
        for backend in checklist.serving(record, case):

            def run(case=case, backend=backend):
                equal = check_graph(case, backend, device)
                record.add(cases.facts(case, backend) | {"what": "CUDA graph", "equal": equal})
                if not equal:
                    record.fail(f"{case.label} on {backend}: the replayed graph differs from eager")

            if not record.over:
                record.attempt(f"{case.label} on {backend}", run)

    def compiled(backend):
        worst = check_compiled_layer(backend, device)
        # The same kernels of ours; Inductor may keep an intermediate of the glue in fp32 that eager rounds.
        limit = 4 * torch.finfo(torch.bfloat16).eps
        row = {"case": "layer", "backend": backend, "what": "torch.compile"}
        record.add(row | {"difference_to_eager": worst, "limit": limit})
        if max(worst.values()) > limit:
            record.fail(f"the compiled layer on {backend} differs from eager: {worst}")

    whole = Case("block_causal_attention", 2, (16, 16), D=64 if record.dry else 72)
    for backend in checklist.serving(record, whole):
        if not record.over:
            record.attempt(f"torch.compile of a layer on {backend}", lambda b=backend: compiled(b), COMPILE_LIMIT)
    return f"{len(record.rows)} checks"
