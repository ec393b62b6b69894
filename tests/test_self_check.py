"""Kernels that are wrong on this machine are found, remembered and passed over: planted mistakes, without a GPU.

Backends triton (interpreted) and cuda (emulated) stand in for themselves on a GPU: they are chosen without being named,
and checked at their first use.
"""

import json
import threading

import pytest
import torch

import ard_kernels
from ard_kernels import adaln_modulate, block_causal_attention
from ard_kernels.block_causal_attention import op as attention_op
from ard_kernels.block_causal_attention import trials as attention_trials
from ard_kernels.common import backends, findings, self_check
from ard_kernels.common.findings import FAILED, PASSED, RUNNING, UNKNOWN, Finding, Kind
from ard_kernels.segment_adaln import op as adaln_op
from ard_kernels.segment_adaln import trials as adaln_trials
from testing.devices import on_devices

CPU = torch.device("cpu")
C = 24
pytestmark = pytest.mark.simulated
ATTENTION = ("segment_attention", torch.bfloat16, 64)
ADALN = ("adaln_modulate", torch.float32, C)
# The triton backend of adaLN is interpreted in tenths of seconds, attention on the emulator in about one.
GPU_KERNELS = on_devices(triton=[ADALN], cuda=[ATTENTION])


@pytest.fixture(autouse=True)
def machine(unknown_machine, monkeypatch):
    """And few, small trials: of interpreted kernels."""
    (call,) = (call for call in attention_trials.CALLS if call.label == "teacher forcing")
    monkeypatch.setattr(attention_trials, "CALLS", (call._replace(lengths=(20, 7, 12) * 2),))
    monkeypatch.setattr(adaln_trials, "LENGTHS", (5, 1, 6))
    return unknown_machine


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU's automatic choice is that of a GPU: `order`, and then torch. ("cpu" stands in for a GPU kernel where
    any will do, for it takes milliseconds.)"""

    def choose(*order):
        monkeypatch.setattr(self_check, "NEEDED_ON", {"cpu"})
        monkeypatch.setattr(self_check, "GPU_KERNELS", order)
        monkeypatch.setattr(backends, "automatic_order", lambda *_: (*order, "torch"))

    return choose


def kernels_of(op, backend):
    return (attention_op if op == "segment_attention" else adaln_op).KERNELS[backend]


def run(op, dtype, width, backend=None):
    """Any call of that kind."""
    if op == "segment_attention":
        q = torch.randn(1, 1, 8, width).to(dtype)
        return block_causal_attention(q, q, q, segment_length=4, backend=backend)
    x, row = torch.randn(1, 4, width).to(dtype), torch.randn(1, 1, width)
    return adaln_modulate(x, row, row, segment_length=4, backend=backend)


def spoil(monkeypatch, op, backend, direction, how):
    """Plant a mistake: how(args) after the kernel has written its results among them."""
    module = kernels_of(op, backend)
    real = getattr(module, direction)

    def spoiled(*args):
        real(*args)
        how(args)

    monkeypatch.setattr(module, direction, spoiled)


def count(monkeypatch, module, name):
    """A list that grows with each call of module.name."""
    real, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: (calls.append(args), real(*args))[1])
    return calls


def last_row(x):
    x[..., -1, :] *= 1.01 if x.dtype == torch.float32 else 1.5


def attention_values(args):
    last_row(args[3])


def attention_gradients(args):
    last_row(args[7])  # dq alone: the mistake of a leading kernel at D = 72


def adaln_values(args):
    last_row(args[8])  # y


def adaln_gradients(args):
    args[13].mul_(1.001)  # dshift


PLANTED = {
    "segment_attention": {"forward": (attention_values, "out"), "backward": (attention_gradients, "dq")},
    "adaln_modulate": {"forward": (adaln_values, "y"), "backward": (adaln_gradients, "dshift")},
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("backend", "device", "op", "dtype", "width"), GPU_KERNELS)
def test_a_kernel_that_is_wrong_is_passed_over(
    backend, device, op, dtype, width, direction, monkeypatch, as_on_a_gpu, capsys
):
    """At its first use, and from then on; named it is refused with the reason, and `backends` has it."""
    how, result = PLANTED[op][direction]
    as_on_a_gpu(backend)
    spoil(monkeypatch, op, backend, direction, how)
    assert backends.resolve(op, None, CPU, dtype, width) == "torch"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ard_kernels: first use of {op} on {backend}") and "failed" in line
    assert f"{result}: error " in line and "times what is allowed" in line
    plain = run(op, dtype, width, "torch")
    assert run(op, dtype, width).shape == plain.shape
    assert capsys.readouterr().err == "", "checked once"
    with pytest.raises(ValueError, match=rf"backend '{backend}' .*failed its self-check on this machine .*{result}: "):
        run(op, dtype, width, backend)
    assert "failed its self-check" in ard_kernels.backends(dtype=dtype)[op][backend].reason

    assert [finding.status for finding in findings.load(CPU).values()] == [FAILED], "so it is for other processes"


@pytest.mark.parametrize(("backend", "device", "op", "dtype", "width"), GPU_KERNELS)
def test_a_kernel_that_is_right_is_chosen(backend, device, op, dtype, width, as_on_a_gpu, capsys):
    as_on_a_gpu(backend)
    for _ in range(2):
        assert backends.resolve(op, None, CPU, dtype, width) == backend
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ard_kernels: first use of {op} on {backend}") and "passed in" in line
    self_check.forget()  # another process
    assert backends.resolve(op, None, CPU, dtype, width) == backend
    assert capsys.readouterr().err == "", "the record is asked"
    assert run(op, dtype, width).isfinite().all()


@pytest.mark.parametrize(("backend", "device", "op", "dtype", "width"), GPU_KERNELS[:1])
def test_what_moves_from_run_to_run_fails(backend, device, op, dtype, width, monkeypatch):
    runs = iter(range(1000))
    spoil(monkeypatch, op, backend, "forward", lambda args: args[8].mul_(1 + 2.0**-23 * (next(runs) == 2)))
    finding = self_check.examine(Kind(op, backend, dtype, width), CPU, 4)
    assert finding.status == FAILED and "y not bit-equal in a second run" in finding.why


@pytest.mark.parametrize(("backend", "device", "op", "dtype", "width"), GPU_KERNELS[:1])
def test_what_is_not_written_is_no_right_result_of_before(backend, device, op, dtype, width, monkeypatch):
    monkeypatch.setattr(kernels_of(op, backend), "forward", lambda *args: None)
    finding = self_check.examine(Kind(op, backend, dtype, width), CPU, 2)
    assert finding.status == FAILED and "y: error" in finding.why


def test_no_reference_is_no_failure(as_on_a_gpu, monkeypatch):
    """PyTorch's kernel for float64 may be switched off by the caller; and a GPU that has failed fails in all of it."""
    as_on_a_gpu("cpu")
    monkeypatch.setattr(adaln_op.torch_impl, "forward", raising(RuntimeError("No available kernel")))
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "torch"
    (finding,) = findings.load(CPU).values()
    assert finding.status == UNKNOWN and "PyTorch itself failed: RuntimeError: No available kernel" in finding.why


def raising(error):
    def refuse(*args):
        raise error

    return refuse


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (RuntimeError("no kernel image"), FAILED, "RuntimeError: no kernel image"),
        (torch.cuda.OutOfMemoryError("full"), UNKNOWN, "no memory"),
    ],
)
def test_a_check_that_raises(error, status, why, monkeypatch, as_on_a_gpu, machine):
    """A kernel that cannot run has failed; a GPU that is full says nothing of it, and the next process asks again."""

    as_on_a_gpu("cpu")
    monkeypatch.setattr(kernels_of("adaln_modulate", "cpu"), "forward", raising(error))
    checks = count(monkeypatch, self_check, "examine")
    for _ in range(3):
        assert backends.resolve(*ADALN[:1], None, CPU, *ADALN[1:]) == "torch"
    (finding,) = findings.load(CPU).values()
    assert finding.status == status and why in finding.why
    assert len(checks) == 1, "a call of a training step must not check each time"
    monkeypatch.undo()


def test_a_check_that_took_its_process_with_it(as_on_a_gpu, monkeypatch):
    """Its mark stays in the record. Of a process that runs it says nothing; a second one of a process that is no more
    is a failure, the first may be of one that somebody ended."""
    kind = Kind("adaln_modulate", "cpu", *ADALN[1:])
    as_on_a_gpu("cpu")
    findings.keep(CPU, kind, Finding(RUNNING, repeats=5))
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "cpu", "this very process"

    def died(mark):
        findings.keep(CPU, kind, mark)
        path = findings.folder(CPU) / kind.file
        content = json.loads(path.read_text())
        node = content["finding"]["by"].partition("@")[2]
        content["finding"]["by"] = f"{2**22 + 1}@{node}"  # beyond the largest process
        path.write_text(json.dumps(content))
        self_check.forget()

    died(Finding(RUNNING, repeats=1))
    kept = count(monkeypatch, findings, "keep")
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "cpu"
    died(kept[0][2])  # so did the check that this call began
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "torch"
    with pytest.raises(ValueError, match="two checks of it ended their processes"):
        backends.resolve(ADALN[0], "cpu", CPU, *ADALN[1:])


def test_compiled_callers_ask_the_record_only(as_on_a_gpu, monkeypatch, recwarn):
    """Nothing is checked while a compiler traces: what is unknown is not chosen, unless verified on that chip."""
    as_on_a_gpu("triton")
    seen = []
    monkeypatch.setattr(self_check, "examine", lambda *_: pytest.fail("checked inside a compiled region"))
    forward = kernels_of("adaln_modulate", "triton").forward
    monkeypatch.setattr(kernels_of("adaln_modulate", "triton"), "forward", lambda *a: (seen.append(1), forward(*a)))
    x, row = torch.randn(1, 4, C), torch.randn(1, 1, C)

    def call(x):
        return adaln_modulate(x, row, row, segment_length=4)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    expected = adaln_modulate(x, row, row, segment_length=4, backend="torch")
    assert torch.equal(compiled(x), expected) and not seen
    assert any("a compiler is tracing the call; call it once before" in str(w.message) for w in recwarn)

    kind = Kind("adaln_modulate", "triton", torch.float32, C)
    for status, runs in ((PASSED, 1), (FAILED, 0)):
        seen.clear()
        findings.keep(CPU, kind, Finding(status, "planted"))
        self_check.forget()
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(x), expected)
        assert len(seen) == runs
    torch.compiler.reset()

    def named(x):
        return adaln_modulate(x, row, row, segment_length=4, backend="triton")

    with pytest.raises(Exception, match="failed its self-check"):
        torch.compile(named, fullgraph=True, backend="eager")(x)


def test_not_in_a_backward_pass(as_on_a_gpu, monkeypatch):
    as_on_a_gpu("triton")
    monkeypatch.setattr(self_check, "examine", lambda *_: pytest.fail("checked inside a backward pass"))
    chosen = []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            chosen.append(backends.resolve(ADALN[0], None, CPU, *ADALN[1:]))
            return grad

    Late.apply(torch.ones(1, requires_grad=True)).backward()
    assert chosen == ["torch"]
    assert not findings.load(CPU), "it is checked at the next call outside of one"


def test_a_backward_pass_does_not_wait_for_a_check(as_on_a_gpu):
    """That check's own gradients may be waiting for its thread."""
    as_on_a_gpu("triton")
    chosen = []

    def backward():
        x = torch.ones(1, requires_grad=True)
        y = x.clone()
        y.register_hook(lambda grad: chosen.append(backends.resolve(ADALN[0], None, CPU, *ADALN[1:])))
        y.backward()

    thread = threading.Thread(target=backward, daemon=True)
    with self_check._one_at_a_time:
        thread.start()
        thread.join(20)
        assert chosen == ["torch"]
    thread.join()


def test_a_user_without_a_home(monkeypatch, tmp_path):
    """A container's user that is a number: nothing in the record, but calls run."""
    monkeypatch.delenv("ARD_CACHE_DIR")
    monkeypatch.setattr(findings.machine.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(findings.machine.Path, "home", raising(RuntimeError("Could not determine home directory.")))
    findings.folder.cache_clear()
    assert run("adaln_modulate", torch.float32, C).isfinite().all()
    assert findings.folder(CPU).is_relative_to(tmp_path)


def test_a_gradient_through_history_takes_the_kernels_of_segment_attention():
    """Theirs is the finding that counts."""
    findings.keep(CPU, Kind("segment_attention", "cpu", torch.float32, 64), Finding(FAILED, "planted"))
    self_check.forget()
    cache = ard_kernels.HistoryCache(1, 1, 2, 64, 16, torch.float32, "cpu")
    q = torch.randn(1, 2, 4, 64, requires_grad=True)
    ard_kernels.history_attention(q, q, q, cache, layer=0).sum().backward()
    assert q.grad.isfinite().all()


def test_modes_of_the_caller_do_not_reach_the_check(as_on_a_gpu):
    """Inference mode, autocast, another default device, hooks of saved tensors, a generator of random numbers."""
    as_on_a_gpu("cpu")
    state = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("packed"), lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), hooks:
        assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "cpu"
    assert torch.equal(torch.get_rng_state(), state)


def test_two_threads_check_once(as_on_a_gpu, capsys):
    as_on_a_gpu("cpu")
    chosen = []
    threads = [
        threading.Thread(target=lambda: chosen.append(backends.resolve(ADALN[0], None, CPU, *ADALN[1:])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == ["cpu"] * 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_turned_off(as_on_a_gpu, monkeypatch):
    as_on_a_gpu("cpu")
    findings.keep(CPU, Kind("adaln_modulate", "cpu", *ADALN[1:]), Finding(FAILED, "planted"))
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "torch"
    monkeypatch.setattr(self_check, "ENABLED", False)
    self_check.forget()
    assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "cpu"
    monkeypatch.setenv("ARD_SELF_CHECK", "no")
    with pytest.raises(ValueError, match="ARD_SELF_CHECK is 'no'; expected 0 or 1"):
        self_check._asked()


def test_a_cpu_kernel_that_failed_is_passed_over():
    """The CPU's are checked by the doctor only; what it found holds for the automatic choice, too."""
    kind = Kind("segment_attention", "cpu", torch.float32, 64)
    assert backends.resolve("block_causal_attention", None, CPU, torch.float32, 64) == "cpu"
    findings.keep(CPU, kind, Finding(FAILED, "planted"))
    self_check.forget()
    for op in ("block_causal_attention", "segment_attention"):  # one kernel behind both
        assert backends.resolve(op, None, CPU, torch.float32, 64) == "torch"
    assert backends.resolve("segment_attention", None, CPU, torch.float32, 72) == "cpu"
    status = ard_kernels.backends("cpu")["segment_attention"]["cpu"]
    assert status.available and "width 64" in status.reason and "planted" in status.reason


@pytest.mark.parametrize("content", ["", "{}", '{"kind": ["a", "b", "float33", 1], "finding": {"status": "passed"}}'])
def test_a_broken_record_says_so_and_counts_as_none(content):
    kind = Kind("segment_attention", "cpu", torch.float32, 64)
    findings.keep(CPU, kind, Finding(FAILED, "planted"))
    (findings.folder(CPU) / kind.file).write_text(content)
    with pytest.warns(UserWarning, match="holds no finding of a self-check"):
        assert findings.load(CPU) == {}


def test_a_record_that_cannot_be_written(monkeypatch, tmp_path, as_on_a_gpu):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARD_CACHE_DIR", str(tmp_path / "file"))
    findings.folder.cache_clear()
    as_on_a_gpu("cpu")
    with pytest.warns(UserWarning, match="cannot keep what a self-check found"):
        assert backends.resolve(ADALN[0], None, CPU, *ADALN[1:]) == "cpu"


def test_a_kernel_built_anew_is_another_one(monkeypatch):
    before = findings.folder(CPU)
    assert findings._digest(CPU) == findings._digest(CPU)
    monkeypatch.setattr(findings.machine, "PACKAGE", findings.machine.PACKAGE / "common")
    findings.folder.cache_clear()
    assert findings.folder(CPU) != before
