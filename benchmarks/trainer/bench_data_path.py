"""Batches of the trajectory store in training order, files in the page cache: ours, and what else one would write.

64 samples of DiT-XL/2's kind: 4 x 32 x 32 noise and S = 4 states, fp16.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ard.common.streams import batch_indices
from ard.data.trajectories import StoreSpec, TrajectoryStore, generate_store
from ard.models.config import Condition

from ard_kernels.tune.timing import interleaved
from benchmarks.measure import Group, Measurement
from benchmarks.results import compared, goal

DEVICE = torch.device("cpu")
COUNT, BATCH, IMAGE, STEPS = 2048, 64, (4, 32, 32), 4
SAMPLES_PER_SECOND = 2000.0  # what a core has to deliver


def make_store(folder: Path) -> TrajectoryStore:
    spec = StoreSpec(
        count=COUNT, shard_size=512, seed=0, image_shape=IMAGE, conditions=(Condition("labels", classes=1000),),
        sampling_steps=25, keep=(15, 10, 5, 0), cfg_scale=1.5, cfg_channels=3, dtype="float16",
    )  # fmt: skip

    def batch(noise, labels):
        states = torch.randn(len(noise), STEPS, *IMAGE).half()
        return SimpleNamespace(noise=noise.half(), x0=states, ode=states, conditions=(labels,))

    return generate_store(folder, spec, batch)


def flat(batch):
    states, targets, conditions = batch
    return states, targets, *conditions


def measure() -> Measurement:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder / "store")
        everything = torch.arange(COUNT)
        noise, x0, labels = (store.read(part, everything) for part in ("noise", "x0", "labels"))
        (folder / "samples").mkdir()
        for i in range(COUNT):
            torch.save((noise[i].clone(), x0[i].clone(), labels[i].clone()), folder / "samples" / f"{i}.pt")
        np.save(folder / "x0.npy", x0.numpy())
        np.save(folder / "noise.npy", noise.numpy())
        x0_map, noise_map = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("x0", "noise"))

        def joined(noise_n, targets, labels_n):
            return torch.cat([noise_n[:, None], targets[:, :-1]], dim=1), targets, (labels_n,)

        def one_file_each(indices):
            parts = zip(*(torch.load(folder / "samples" / f"{i}.pt") for i in indices.tolist()), strict=True)
            return joined(*map(torch.stack, parts))

        def numpy_maps(indices):
            where = indices.numpy()
            return joined(torch.from_numpy(noise_map[where]), torch.from_numpy(x0_map[where]), labels[indices])

        readers = {"ours": store.pairs, "numpy_memmap": numpy_maps, "torch_load_per_sample": one_file_each}
        first = batch_indices(0, 0, BATCH, COUNT)
        for reader in readers.values():
            for got, expected in zip(flat(reader(first)), flat(store.pairs(first)), strict=True):
                assert torch.equal(got, expected)

        def batches(reader):
            steps = itertools.count()
            return lambda: reader(batch_indices(0, next(steps), BATCH, COUNT))

        timings = interleaved({name: batches(reader) for name, reader in readers.items()}, 100, 3, seconds=4.0)
    rate = BATCH / timings["ours"].median * 1e3
    reached = goal("samples/s", rate, SAMPLES_PER_SECOND)
    row = compared(
        timings, "ours", ["numpy_memmap", "torch_load_per_sample"], 1.0, op="data_path",
        shape=f"B{BATCH} S{STEPS} 4x32x32", direction="batch", dtype="float16", rate=rate, unit="samples/s",
        targets=[reached], met=reached["met"],
    )  # fmt: skip
    return Measurement([row], timings)


GROUPS = [Group("data path", ("ours", "numpy_memmap", "torch_load_per_sample"), measure)]


def test_batches(group, candidate, report):
    report(group, candidate)
