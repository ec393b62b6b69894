"""examples/streaming_digits: its data, its scores, and the whole command with --quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "streaming_digits"


@pytest.fixture
def moving(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import moving

    return moving


def test_digits_move_and_bounce(moving):
    """One scan in every frame, whole, a hop from where it was at most, and in time at both walls."""
    scans = torch.linspace(-0.9, 1, 64).view(1, 1, 8, 8)
    video, classes = moving.clips(scans, torch.tensor([7]), 12, 50, torch.Generator().manual_seed(0))
    assert video.shape == (50, 12, 32, 32) and classes.tolist() == [7] * 50
    reader = moving.Reader(scans, torch.tensor([7]))
    _, corners, errors = reader(video.flatten(0, 1))
    torch.testing.assert_close(errors, torch.zeros_like(errors), atol=1e-6, rtol=0)
    assert (video > -1).sum((2, 3)).eq(64).all()
    corners = corners.view(50, 12, 2)
    hops = corners.diff(dim=1)
    assert hops.abs().eq(moving.STEP).all()
    assert corners.min() == 0 and corners.max() == moving.REACH
    again, _ = moving.clips(scans, torch.tensor([7]), 12, 50, torch.Generator().manual_seed(0))
    assert torch.equal(video, again)


def test_scores_tell_right_from_wrong(moving):
    from ard.data import digits
    from rollout import judge

    real = digits.load()
    reader = moving.Reader(real.train_images, real.train_labels)
    held_out = real.held_out_images, real.held_out_labels
    video, classes = moving.clips(*held_out, 20, 8, torch.Generator().manual_seed(0))
    for span in judge(video, classes, reader).values():
        assert span["right"] > 0.9 and span["moves"] == 1
    video[:, 18:] = video[:, 18:].roll((2 * moving.STEP, 1), (2, 0))  # further than a digit hops, and of another stream
    *_, last = judge(video, classes, reader).values()
    assert last["right"] < 0.5 and last["moves"] < 1


@pytest.mark.parametrize("view", ["window + sink", "window", "no history"])
def test_a_rollout_computes_what_training_did(moving, view):
    """Frame by frame through the rolling cache, or at once under the mask of [clean | noisy]: the same velocities."""
    from model import DEPTH, HEAD_DIM, HEADS, L, Past, VideoDiT
    from training import Forcing, Settings, views

    from ard_kernels import HistoryCache

    settings = Settings()
    network = VideoDiT()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        shape = 2, settings.frames
        clean, noisy = torch.randn(2, *shape, moving.SIDE, moving.SIDE)
        t, classes = 0.1 + 0.9 * torch.rand(shape), torch.tensor([3, 8])
        at_once = Forcing(settings, view)(network, clean, noisy, t, classes)
        window, sink = views(settings)[view]
        cache = HistoryCache.rolling(DEPTH, 2, HEADS, HEAD_DIM, segment_length=L, window=window, sink=sink)
        by_frame = []
        for frame in range(settings.frames):
            place, one = torch.tensor([frame]), slice(frame, frame + 1)
            for x, times, commit in ((noisy, t, False), (clean, torch.zeros(shape), True)):
                past = Past(place, cache=cache, commit=commit, frame_for_sink=place if sink else None)
                by_frame.append(network(x[:, one], times[:, one], classes, [frame == 0], past))
    torch.testing.assert_close(torch.cat(by_frame[::2], 1), at_once, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_command(tmp_path):
    """Quick: losses fall, the cache's memory stays, the report and the animation are there."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text() in done.stdout
    assert (tmp_path / "streams.webp").read_bytes()[8:12] == b"WEBP"
    report = json.loads((tmp_path / "report.json").read_text())
    (seed,) = report["seeds"]
    teacher = report["teacher_losses"]
    assert len(teacher) == report["settings"]["teacher_updates"]
    assert sum(teacher[-5:]) < 0.5 * sum(teacher[:5])
    assert seed["real"] and len(seed["rows"]) == 5
    for row in seed["rows"]:
        early, late = row["cache_bytes"]
        assert early == late > 0
        for span in row["scores"].values():
            assert 0 <= span["right"] <= 1 and 0 <= span["moves"] <= 1 and 0 <= span["error"] < 1
