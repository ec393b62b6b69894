"""The tuner: what it makes of calls and of shapes in words; which configurations it refuses, and what it keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ard_kernels
from ard_kernels.common import tuning
from ard_kernels.common.record import line_of
from ard_kernels.tune import __main__ as tune
from ard_kernels.tune.calls import Call, calls_of
from ard_kernels.tune.search import difference, plan, text_of, tune_kernel
from ard_kernels.tune.shapes import SHAPES, calls_of_shape
from testing import cases
from testing.cases import NORM_ROPE, OPS, SEGMENT, Case

ROOT = Path(__file__).parents[1]
FORWARD = "attention_forward/16bit/64/short"
SHAPE = "H=2 D=16 L=16 S=2"


class Noted(TorchDispatchMode):
    """Raw calls with copies of their inputs, as they were before, and what they gave."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "ard":
            return func(*args, **(kwargs or {}))
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        line = line_of(func.name().removeprefix("ard::"), args)
        outputs = func(*args)
        self.calls.append((line, before, outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs


@pytest.mark.parametrize("op", [*OPS, SEGMENT])
def test_a_call_can_be_repeated(op, device):
    """On the same values it gives the same bits, on the same layout of memory; and its backward is one of its own."""
    case = Case(op, 1, (4,), H=2, D=16) if op == NORM_ROPE else cases.tiny_case(op, D=16)
    case = Case(op, 1, (16, 16), H=1, D=16, mask="teacher-forcing") if op == SEGMENT else case
    inputs = cases.make_inputs(case, device)
    with Noted() as noted:
        outputs = cases.run_ours(case, inputs, "triton")
        if op != "history_attention":
            torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
    assert {line.count("_backward") for line, _, _ in noted.calls} == ({0} if op == "history_attention" else {0, 1})
    for line, before, given in noted.calls:
        call = Call.of(line)
        made = call.make(device)
        for mine, theirs in zip(made.values(), before, strict=False):
            if not isinstance(theirs, torch.Tensor):
                assert mine == (list(theirs) if isinstance(theirs, (list, tuple)) else theirs)
            elif theirs.is_floating_point():
                assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
                mine.copy_(theirs)
            else:
                assert torch.equal(mine, theirs), "host integers are recorded by value"
        expected = [y for y in given if y is not None and y.numel()]
        for _ in range(2):
            assert all(map(torch.equal, call.run(made), expected)), line


def test_strides_are_those_of_the_call(device):
    q, k, v = torch.randn(1, 32, 3, 2, 16, device=device, requires_grad=True).unbind(2)
    run = lambda: ard_kernels.block_causal_attention(q, k, v, segment_length=16, layout="bthd", backend="triton")  # noqa: E731
    (call,) = calls_of(run)
    made = call.make(device)
    assert [made[name].stride() for name in "qkv"] == [q.transpose(1, 2).stride()] * 3


def test_what_a_backward_is_given_fits_together(device):
    """lse and out are those of q, k, v: with drawn ones scores of a wide softmax scale would overflow in fp16."""
    q, k, v = torch.randn(3, 1, 1, 32, 16, device=device, dtype=torch.float16, requires_grad=True).unbind()

    def run():
        out = ard_kernels.block_causal_attention(q, k, v, segment_length=16, scale=8.0, backend="triton")
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    backward = calls_of(run)[1]
    gradients = backward.run(backward.make(device))
    assert len(gradients) == 3 and all(x.isfinite().all() for x in gradients)


KERNELS = {
    "segment_attention": {"attention_forward", "attention_backward_dq", "attention_backward_dkv"},
    "history_attention": {"attention_history"},
    "adaln_modulate": {"adaln_forward", "adaln_backward"},
    "gate_residual_adaln": {"adaln_forward", "adaln_backward"},
    "gate_residual": {"adaln_forward", "adaln_backward"},
    "qk_norm_rope": {"rope_forward", "rope_backward"},
}


@pytest.mark.parametrize("op", SHAPES)
def test_a_shape_in_words_plans_the_kernels_of_its_op(op):
    """At sizes of real models: nothing of them is computed."""
    sizes = {"segment_attention": "H=12 D=128 L=4680 S=7 mask=teacher_forcing window=3 kv_heads=4"}
    sizes |= {"history_attention": "H=12 D=128 L=4680 S=12 window=6 sink=1", NORM_ROPE: "H=12 D=128 T=32760 over=all"}
    planned, refused = plan(calls_of_shape(f"op={op} {sizes.get(op, 'C=1536 L=1560 S=21')}"))
    assert {key.split("/")[0] for key in planned} == KERNELS[op] and not refused
    assert all("/16bit/" in key and key.endswith("/long") for key in planned)


def test_a_shape_means_the_call_of_the_public_function():
    calls = calls_of_shape("B=2 H=4 kv_heads=2 D=16 L=5 S=3 mask=teacher_forcing window=2 dtype=fp16")
    assert [call.op for call in calls] == ["segment_attention", "segment_attention_backward"]
    assert calls[0].tensors["q"] == {"shape": [2, 4, 30, 16], "strides": [1920, 16, 64, 1], "dtype": "float16"}
    assert calls[0].tensors["k"]["shape"] == [2, 2, 30, 16]
    assert calls[0].inputs["mask"] == ard_kernels.SegmentMask.teacher_forcing(3, 2).code
    places = calls_of_shape("op=history_attention H=2 D=16 L=4 S=3")
    assert [call.tensors["positions"]["values"][4:] for call in places] == [[], [1, 0, 4], [2, 0, 4, 8]]


def test_of_calls_with_one_entry_the_one_of_most_work_is_tuned():
    planned, _ = plan([call for S in (2, 5, 3) for call in calls_of_shape(f"H=2 D=16 L=256 S={S}")])
    assert [call.tensors["q"]["shape"][2] for call in planned.values()] == [5 * 256] * 3


def test_calls_that_no_kernel_serves_are_named():
    wide = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    lines = [line_of("segment_attention", [wide] * 3 + ["1|0:1", [16], [16], 0.25, "torch"])]
    lines.append(line_of("gelu", [torch.zeros(2), "cpu"]))
    planned, refused = plan(map(Call.of, lines))
    assert not planned and len(refused) == 2
    assert ["float64 is served by the torch backend only" in why for why in refused.values()] == [True, False]


@pytest.mark.parametrize(
    "text, message",
    [
        ("H", "got 'H'; expected NAME=VALUE"),
        ("H=", "got 'H='; expected NAME=VALUE"),
        ("H=2 H=3", "got H twice"),
        ("op=attention", "op is 'attention'; expected one of segment_attention, history_attention"),
        ("C=3", "got C=3; expected of segment_attention: H, D, L, S, kv_heads"),
        ("H=2 D=16", "segment_attention without L, S; expected each, as in L=16"),
        ("H=0", "H is '0'; expected an integer >= 1"),
        ("H=1.5", r"H is '1\.5'; expected an integer >= 1"),
        ("sink=-1", "sink is '-1'; expected an integer >= 0"),
        ("dtype=int8", "dtype is 'int8'; expected one of bf16, fp16, fp32"),
        ("mask=causal", "mask is 'causal'; expected one of block_causal, teacher_forcing"),
        ("op=qk_norm_rope over=some", "over is 'some'; expected one of head, all"),
        ("H=2 D=16 L=4 S=2 window=3", r"SegmentMask\.teacher_forcing|SegmentMask\.block_causal: window is 3"),
        ("H=3 kv_heads=2 D=16 L=4 S=2", r"k has shape .*; expected q's .* \(heads may be fewer that divide q's\)"),
        ("H=2 D=300 L=4 S=2", "expected a multiple of 8"),
    ],
)
def test_a_shape_that_says_nothing_sensible_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        calls_of_shape(text)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A cache folder of this test's own."""

    def forget():
        tuning.tuned_here.cache_clear()
        tuning.lookup.cache_clear()

    monkeypatch.setenv("ARD_CACHE_DIR", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def with_default(device, **constants):
    """Candidates of every kernel: its default with other constants."""
    return lambda key: [{**tuning.default(key, device), **constants}]


def kept(device):
    return json.loads(tuning.cache_file(device).read_text())


def test_the_winner_is_kept_and_found_by_the_next_run(tables, device, capsys):
    other, names = "rope_forward/16bit/1024/long", [f"adaln_{way}/16bit/512/long" for way in ("forward", "backward")]
    arguments = ["--shape", "op=gate_residual C=16 L=4 S=1", "--ops", "segment_adaln", "--seconds-per-kernel", "1"]

    def run(*more):
        status = tune.main([*arguments, *more], device, with_default(device, TOKENS=8))
        return status, capsys.readouterr().out

    tuning.keep(device, other, {"BLOCKS": 7}, "another call")
    status, output = run()
    table = kept(device)
    assert status == 0 and output.count("2 timed, 0 refused, on segment_adaln") == 2
    assert list(table["configs"]) == [other, *names] == list(table["calls"])
    assert table["configs"][other] == {"BLOCKS": 7}, "others stay"
    for name in names:
        default = tuning.default(name, device)
        assert table["configs"][name] in (default, {**default, "TOKENS": 8})
        assert f"{name}: {text_of(table['configs'][name])} " in output
    assert output.endswith(f"2 of 2 kernels tuned: {tuning.cache_file(device)}\n")
    assert [path.name for path in tables.iterdir()] == [tuning.cache_file(device).name], "no partial file is left"
    status, output = run()
    assert status == 0 and output.count("tuned before on") == 2 and kept(device) == table
    tuning.keep(device, names[0], default, "another call")
    assert run()[1].count("tuned before on") == 1, "tuned on another call, so once more"
    assert "tuned before" not in run("--again")[1]


def test_what_is_kept_is_looked_up(tables, monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    arguments = ("attention_forward", cuda, torch.bfloat16, 72, 256)
    assert tuning.lookup(*arguments) == tuning.shipped(90)["attention_forward/16bit/72/long"]
    tuning.keep(cuda, "attention_forward/16bit/72/long", {"BLOCK_M": 5}, "call")
    assert tuning.lookup(*arguments) == {"BLOCK_M": 5}
    assert tuning.tuned_on(cuda) == {"attention_forward/16bit/72/long": "call"}


def tuned(device, candidates, seconds=60.0):
    call = calls_of_shape("H=1 D=64 L=16 S=2")[0]
    return tune_kernel(FORWARD, call, candidates, device, seconds, rounds=2)


def test_a_configuration_that_does_not_compile_is_refused(device):
    default = tuning.default(FORWARD, device)
    bad = {**default, "BLOCK_M": 48}
    found = tuned(device, [bad, {**default, "BLOCK_M": 16}, {"BLOCK_Q": 16}])
    assert list(found.refused) == [text_of(bad)] and "power of 2" in found.refused[text_of(bad)]
    assert len(found.milliseconds) == 2, "what has other constants belongs to another kernel"


def test_a_configuration_with_other_results_is_refused(device, monkeypatch):
    """However fast: here it is faster, as it computes nothing."""
    default = tuning.default(FORWARD, device)
    wrong, nan = ({**default, "BLOCK_M": rows} for rows in (16, 64))
    run = Call.run

    def planted(call, made):
        config = next((configs[FORWARD] for configs, _ in tuning._overrides if FORWARD in configs), None)
        factor = {text_of(wrong): 2.0, text_of(nan): float("nan")}.get(text_of(config), 1.0)
        return [x * factor for x in run(call, made)]

    monkeypatch.setattr(Call, "run", planted)
    found = tuned(device, [wrong, nan])
    assert found.winner == default and list(found.milliseconds) == [text_of(default)] and found.gain == 1.0
    assert "differs from the default by 1.00e+00 of the 2-norm" in found.refused[text_of(wrong)]
    assert "by inf of the 2-norm" in found.refused[text_of(nan)]


def test_results_may_differ_as_far_as_their_dtypes_round():
    right = [torch.ones(8), torch.ones(8, dtype=torch.bfloat16)]
    off = [torch.full((8,), 1 + 1e-6), torch.full((8,), 1 + 2**-7, dtype=torch.bfloat16)]
    assert difference([right[0], off[1]], right, torch.float32) == "", "a result in bf16 of a call in fp32"
    assert "by 9.54e-07" in difference(off, right, torch.float32) and difference(off, right, torch.bfloat16) == ""
    zeros = [torch.zeros(8)]
    assert difference(zeros, zeros, torch.float32) == "" and "inf" in difference(right[:1], zeros, torch.float32)


def test_when_the_time_is_over_the_rest_is_not_tried(device):
    default = tuning.default(FORWARD, device)
    found = tuned(device, [{**default, "BLOCK_M": 16}], seconds=1e-9)
    assert found.winner == default and list(found.refused.values()) == ["not tried: 1e-09 seconds were over"]


def test_a_kernel_whose_default_fails_is_named_and_nothing_of_it_kept(tables, device, monkeypatch, capsys):
    bad = {**tuning.default(FORWARD, device), "BLOCK_M": 48}
    default = tuning.default
    monkeypatch.setattr(tuning, "default", lambda key, d: bad if "attention_forward" in key else default(key, d))
    candidates = lambda key: []  # noqa: E731
    assert tune.main(["--shape", SHAPE, "--seconds-per-kernel", "1"], device, candidates) == 1
    key, output = "attention_forward/16bit/32/short", capsys.readouterr().out
    assert f"{key}: failed on segment_attention" in output and "2 of 3 kernels tuned" in output
    assert len(kept(device)["configs"]) == 2 and key not in kept(device)["configs"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "got no shapes; expected --shapes FILE or --shape TEXT"),
        (["--shape", "H=x"], "--shape 'H=x': H is 'x'; expected an integer"),
        (["--shapes", "/absent"], "No such file or directory: '/absent'"),
        (["--shape", SHAPE, "--seconds-per-kernel", "0"], "--seconds-per-kernel is 0.0; expected a number > 0"),
        (["--shape", SHAPE, "--ops", "gelu"], "--ops has 'gelu'; expected some of segment_attention"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main([*arguments, "--dry-run"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def installed(tmp_path, *arguments):
    """The package alone, as pip installs it: neither benchmarks nor testing can be imported."""
    (tmp_path / "ard_kernels").symlink_to(ROOT / "ard_kernels")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    code = "import runpy, sys; sys.modules |= dict.fromkeys(('benchmarks', 'testing', 'ard')); "
    code += "runpy.run_module('ard_kernels.tune', run_name='__main__')"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_installed_package_lists_kernels_and_candidates_without_a_gpu(tmp_path):
    status, output, error = installed(tmp_path, "--dry-run", "--shape", "H=12 D=128 L=4680 S=7")
    assert status == 0, error
    assert "attention_backward_dkv/16bit/128/long: on segment_attention_backward" in output
    assert '\n  {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "num_warps": 8}\n' in output


def test_without_a_gpu_it_says_so(tmp_path):
    status, output, error = installed(tmp_path, "--shape", "H=12 D=128 L=4680 S=7")
    assert (status, output) == (2, "") and "torch sees no GPU; expected an NVIDIA GPU" in error
