"""Plans are made once for each kind of call, and anew where anything differs that they depend on."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch.autograd import forward_ad

from ard_kernels import block_causal_attention, use_backend
from ard_kernels.common import backends, findings, kinds, self_check
from ard_kernels.common.findings import FAILED, Finding, Kind
from ard_kernels.common.kinds import once_per_kind

X = torch.zeros(2, 4)


@pytest.fixture
def ask(monkeypatch):
    """once_per_kind of one maker; returns how often that has been called."""
    monkeypatch.setattr(kinds, "_plans", {})
    made = []

    def make(*call):
        made.append(call)
        return "plan"

    def asked(*tensors, settings=(1,), within=None):
        with within or nullcontext():
            assert once_per_kind(make, tensors or (X, None), *settings) == "plan"
        return len(made)

    return asked


OTHERS = {
    "shape": {"tensors": (torch.zeros(4, 2), None)},
    "strides": {"tensors": (torch.zeros(4, 2).T, None)},
    "dtype": {"tensors": (X.double(), None)},
    "device": {"tensors": (X.to("meta"), None)},
    "gradient": {"tensors": (X.clone().requires_grad_(), None)},
    "tensor for None": {"tensors": (X, X)},
    "float": {"settings": (1.0,)},
    "bool": {"settings": (True,)},
    "None": {"settings": (None,)},
    "lengths": {"settings": ([1],)},
    "no_grad": {"within": torch.no_grad},
    "autocast": {"within": lambda: torch.autocast("cpu", torch.bfloat16)},
    "use_backend": {"within": lambda: use_backend("torch")},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_one_for_each_kind(ask, other):
    other = {"tensors": (), "settings": (1,), "within": nullcontext} | other
    tensors, settings, within = other.values()
    assert ask() == ask() == 1
    assert ask(*tensors, settings=settings, within=within()) == 2
    assert ask(*tensors, settings=settings, within=within()) == ask() == 2


@pytest.mark.parametrize("within", [forward_ad.dual_level, self_check.ignoring_the_record], ids=lambda f: f.__name__)
def test_none_is_kept_where_answers_do_not_last(ask, within):
    assert (ask(within=within()), ask(within=within()), ask(), ask()) == (1, 2, 3, 3)


def test_none_is_kept_of_a_backward_pass_and_what_was_kept_serves_there(ask):
    """No check can be run there, so that a backend may be refused that serves later."""

    def in_a_backward_pass():
        counts = []
        y = torch.ones(2, requires_grad=True) * 2
        y.register_hook(lambda _: counts.append(ask()))  # gradients are not recorded
        y.sum().backward()
        return counts

    assert in_a_backward_pass() + in_a_backward_pass() == [1, 2]
    assert ask(within=torch.no_grad()) == 3
    assert in_a_backward_pass() == [3]


def test_another_threads_request_does_not_get_into_a_plan(monkeypatch):
    """It comes between the key and the choice here; the plan was kept for all calls without a request."""
    monkeypatch.setattr(kinds, "_plans", {})
    room, q = import_module("ard_kernels.block_causal_attention"), torch.randn(1, 1, 8, 8)
    measured_slower = room.measured_slower

    def meanwhile(*call):
        monkeypatch.setattr(backends, "_override", "torch")
        return measured_slower(*call)

    monkeypatch.setattr(room, "measured_slower", meanwhile)
    block_causal_attention(q, q, q, segment_length=4)
    monkeypatch.setattr(backends, "_override", None)
    (plan,) = kinds._plans.values()
    assert plan.backend == "cpu"


def test_lengths_are_a_kind_by_what_they_say(ask):
    lengths = [4, 6]
    assert ask(settings=(lengths,)) == ask(settings=((4, 6),)) == 1
    lengths[1] = 5
    assert ask(settings=(lengths,)) == ask(settings=([4, 5],)) == 2
    assert ask(settings=([4, 6],)) == 2


@pytest.mark.parametrize("setting", [X, [1.0], (True,), [X], [[1]]], ids=str)
def test_other_settings_have_no_key(ask, setting):
    assert (ask(settings=(setting,)), ask(settings=(setting,))) == (1, 2)


def test_subclasses_have_no_key(ask):
    class Other(torch.Tensor):
        pass

    assert (ask(X.as_subclass(Other)), ask(X.as_subclass(Other))) == (1, 2)


@pytest.mark.parametrize("first", [X, None, "text"], ids=["tensor", "None", "text"])
def test_what_raises_is_not_kept(monkeypatch, first):
    monkeypatch.setattr(kinds, "_plans", {})

    def refuse(x, request):
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            once_per_kind(refuse, (first,))
    assert not kinds._plans


def test_a_verdict_reaches_calls_that_were_planned_before(unknown_machine, monkeypatch):
    """What another process's check has found, once this one reads the record again."""
    q = torch.randn(1, 1, 8, 8)
    ran = []
    room = import_module("ard_kernels.block_causal_attention")
    monkeypatch.setattr(room, "choose", lambda *call: ran.append(backends.choose(*call)) or ran[-1])
    monkeypatch.setattr(kinds, "_plans", {})
    for _ in range(2):
        block_causal_attention(q, q, q, segment_length=4)
    findings.keep(q.device, Kind("segment_attention", "cpu", q.dtype, 8), Finding(FAILED, "planted"))
    self_check.forget()
    for _ in range(2):
        block_causal_attention(q, q, q, segment_length=4)
    assert ran == ["cpu", "torch"]
    with pytest.raises(ValueError, match="planted"):
        block_causal_attention(q, q, q, segment_length=4, backend="cpu")
