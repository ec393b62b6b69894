"""4-step sampling with history against the same student without, four teacher forwards and the published design."""

from functools import partial

from benchmarks.measure import Group
from benchmarks.student.work import compare_sampling, model_named
from benchmarks.timing import DEVICE, TINY

ON_GPU = DEVICE.type == "cuda"
# Time that history adds: at most 1.2 % on a GPU, 2 % on the CPU. At most four teacher forwards, or 1.03.
XL_GOALS = {"N0": 1 / 1.012 if ON_GPU else 1 / 1.02, "four_teacher_forwards": 1.0 if ON_GPU else 1 / 1.03}
PUBLISHED = {"published_eager": 1.0}


def sampling(model: str, batch: int, goals: dict[str, float], rounds: int, seconds: float) -> Group:
    how = {"goals": goals, "rounds": rounds, "seconds": seconds, "warmup": 0}  # each has run twice before
    run = partial(compare_sampling, model, model_named(model), batch, DEVICE, **how)
    return Group(f"sampling {model} B{batch}", ("N6", *goals), run)


if TINY:
    GROUPS = [sampling("tiny", 1, XL_GOALS | PUBLISHED, 2, 1.0)]
elif ON_GPU:
    GROUPS = [sampling("DiT-XL/2", batch, XL_GOALS | PUBLISHED, 30, 10.0) for batch in (1, 32)]
else:
    GROUPS = [sampling("DiT-XL/2", 1, XL_GOALS, 16, 280.0), sampling("DiT-S/2", 1, PUBLISHED, 15, 10.0)]


def test_sampling(group, candidate, report):
    report(group, candidate)
