"""Files made to harm whoever reads them, each a few KB on disk, and the command that is to read it.

A case takes a folder that holds good files (see `good_files`), makes some of them hostile and returns the command.
Commands run in that folder and may write to "out" there and nowhere else.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import struct
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ard.config.recipe import read_recipe, recipe_text
from ard.data.latents import LatentSpec, write_latents
from ard.models.config import Condition
from ard.models.dit import DiT, DiTConfig
from ard.models.student import ARDStudent
from ard.storage import checkpoints
from ard.storage.files import read_sealed_json, write_json, write_sealed_json, write_tensors
from ard.storage.images import write_npz
from ard.storage.shards import MANIFEST_NAME
from ard.training import stages
from ard.weights.diffusers_format import CLASS_NAME, WEIGHTS_NAME, save_diffusers
from ard.weights.opened import open_teacher
from safetensors.torch import load_file, save_file

Case = Callable[[Path], list[str]]

SECONDS = 20  # for one command

LATENTS = ["latents", "images", "--vae", "vae", "--out", "out/store", "--size", "16", "--num-classes", "2"]
SAMPLE = ["--out", "out/samples", "--count", "4", "-c", "recipe.yaml"]
EVALUATE = ["evaluate", "samples", "--reference", "reference.npz", "--out", "out/evaluate.json"]
VERIFY = ["trajectories", "verify", "store"]
DISTILL = ["distill", "-c", "recipe.yaml", "--out", "out/run"]
FINETUNE = ["finetune-gan", "-c", "recipe.yaml", "--out", "out/run"]
PUBLIC, DIFFUSERS = ["out/weights.safetensors", "--to", "public"], ["out/dit", "--to", "diffusers"]
TINY = [
    "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "teacher.checkpoint=teacher.safetensors",
    "trajectories.folder=store", "trajectories.count=12", "trajectories.shard_size=8", "trajectories.batch_size=8",
    "trajectories.sampling_steps=4", "trajectories.keep=[2,0]", "student.history_layers=1", "distill.steps=1",
    "distill.batch_size=8", "preview.every=0", "gan.student=student.safetensors", "gan.real=real",
    "gan.train.steps=1", "gan.train.batch_size=8",
]  # fmt: skip


_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    [
        "ard.cli",
        "ard.training.stages",
        "ard.evaluation.evaluate",
        "ard.data.latents",
        "ard.weights.export",
        "ard.training.trainer",
        "diffusers.models.autoencoders.autoencoder_kl",
    ]
)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _run(arguments: list[str], folder: Path, sender: Any) -> None:
    """The command in this process; sends its exit status and by how many MiB its memory grew."""
    os.chdir(folder)
    os.environ.update(TMPDIR=str(folder), CUDA_VISIBLE_DEVICES="")
    sys.argv = ["ard", *arguments]
    for descriptor, name in ((1, "out/stdout"), (2, "out/stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), descriptor)
    before = _peak()
    try:
        from ard.__main__ import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    sender.send((status, _peak() - before))


def answer(arguments: list[str], folder: Path) -> tuple[int | None, float, list[str]]:
    """(exit status or None for a crash or a timeout, growth in MiB, lines on stderr)."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(arguments, folder, sender))
    process.start()
    sender.close()
    status, growth = None, 0.0
    try:
        if receiver.poll(SECONDS):
            status, growth = receiver.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
    errors = folder / "out" / "stderr"
    return status, growth, errors.read_text().splitlines() if errors.exists() else []


def good_files(folder: Path) -> None:
    """What the cases make hostile; unchanged, every command takes it."""
    import diffusers
    from PIL import Image

    torch.manual_seed(0)
    recipe = read_recipe("digits", TINY)
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    teacher = DiT(recipe.model)
    student = ARDStudent.from_teacher(teacher, steps=recipe.steps, history_layers=1)
    write_tensors(folder / "teacher.safetensors", teacher.state_dict())
    write_tensors(folder / "student.safetensors", student.state_dict())
    save_diffusers(
        folder / "dit", DiT(wide := DiTConfig(input_size=4, hidden_size=8, depth=2, num_heads=1)).state_dict(), wide
    )
    tensors = dict(student.state_dict())
    checkpoints.save(
        folder / "run" / "checkpoints", 1, {"model": tensors, "ema": tensors}, {**recipe.student_facts(), "steps": 1},
        keep_last=1,
    )  # fmt: skip
    opened, sha256 = open_teacher(folder / "teacher.safetensors", recipe.model)
    stages.make_trajectories(recipe, opened, sha256, folder / "store")
    spec = LatentSpec(16, 8, (1, 8, 8), (Condition("labels", classes=10),), source="none", encoder="none")
    write_latents(folder / "real", spec, lambda rows: (torch.randn(len(rows), 1, 8, 8), torch.tensor([*rows]) % 10))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(folder / "vae")
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    for name in "ab":
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(images[0, ..., 0]).save(folder / "images" / name / "good.png")
    for path in (folder / "samples" / "samples.npz", folder / "reference.npz", folder / "victim" / "private.npz"):
        path.parent.mkdir(exist_ok=True)
        write_npz(path, [images], 16, np.arange(16) % 10)
    write_json(folder / "samples" / "sample.json", {"file": "samples.npz"})


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def claim(shape: Iterable[int], dtype: str = "F32", offsets: tuple[int, int] = (0, 0)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def edit_tensors(path: Path, **changes: torch.Tensor) -> None:
    """Lays tensors over those of a file; "__" in a name is a point."""
    save_file({**load_file(path), **{k.replace("__", "."): v for k, v in changes.items()}}, path, {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_sealed(path: Path, edit: Callable[[dict], Any]) -> None:
    """An attacker can compute a sha256 too."""
    content = read_sealed_json(path)
    edit(content)
    write_sealed_json(path, content)


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def png(width: int, height: int, bits: int = 1) -> bytes:
    """A black picture; as many pixels as the header says, deflated in pieces."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row, deflate, parts = bytes(1 + (width * bits + 7) // 8), zlib.compressobj(9), []
    block = max(1, (1 << 20) // len(row))
    for first in range(0, height, block):
        parts.append(deflate.compress(row * min(block, height - first)))
    content = b"".join(parts) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def npy(descr: str, shape: Any, data: bytes = b"", version: bytes = b"\x01\x00", header: str | None = None) -> bytes:
    text = (header or repr({"descr": descr, "fortran_order": False, "shape": shape})).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text + data


def npz(path: Path, zeros: int = 0, method: int = zipfile.ZIP_DEFLATED, **arrays: bytes) -> None:
    """arrays: content of each member; ``zeros`` bytes follow that of the first, written in pieces."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, (name, content) in enumerate(arrays.items()):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(content)
                for first in range(0, zeros if number == 0 else 0, 1 << 20):
                    file.write(bytes(min(1 << 20, zeros - first)))


def stored(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _image(content: bytes | Callable[[Path], Any], name: str = "x.png") -> Case:
    def case(folder: Path) -> list[str]:
        path = folder / "images" / "a" / name
        content(path) if callable(content) else path.write_bytes(content)
        return LATENTS

    return case


def _saved(format: str, **options: Any) -> Case:
    """A picture of another format under the name of a PNG."""

    def content(path: Path) -> None:
        from PIL import Image

        Image.new("RGB", (32, 32)).save(path, format=format, **options)

    return _image(content)


def _cut(format: str) -> Case:
    def content(path: Path) -> None:
        from PIL import Image

        file = io.BytesIO()
        Image.effect_noise((200, 200), 90).convert("RGB").save(file, format=format)
        path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])

    return _image(content)


def _on(path: str, edit: Callable[[Path], Any], command: list[str]) -> Case:
    """``command`` after ``edit`` of one file."""

    def case(folder: Path) -> list[str]:
        edit(folder / path)
        return command

    return case


def _vae(**changes: Any) -> Case:
    return _on("vae/config.json", lambda path: edit_json(path, **changes), LATENTS)


def _dit(**changes: Any) -> Case:
    return _on("dit/config.json", lambda path: edit_json(path, **changes), ["export", "dit", *PUBLIC])


def _sample_json(text: str) -> Case:
    return _on("samples/sample.json", lambda path: path.write_text(text), EVALUATE)


def _samples(write: Callable[[Path], Any]) -> Case:
    return _on("samples/samples.npz", write, EVALUATE)


def _reference(write: Callable[[Path], Any]) -> Case:
    return _on("reference.npz", write, EVALUATE)


def _student(write: Callable[[Path], Any], name: str = "student.safetensors") -> Case:
    return _on(name, write, ["sample", name, *SAMPLE])


def _teacher(write: Callable[[Path], Any]) -> Case:
    return _on("teacher.safetensors", write, DISTILL)


def _manifest(edit: Callable[[dict], Any], command: list[str] = VERIFY, store: str = "store") -> Case:
    return _on(f"{store}/{MANIFEST_NAME}", lambda path: edit_sealed(path, edit), command)


def _spec(command: list[str] = VERIFY, store: str = "store", **changes: Any) -> Case:
    return _manifest(lambda content: content["spec"].update(changes), command, store)


def _facts(edit: Callable[[dict], Any], command: tuple[str, ...] = ("sample", "run", *SAMPLE[:-2])) -> Case:
    path = "run/checkpoints/step-00000001/checkpoint.json"
    return _on(path, lambda path: edit_sealed(path, edit), list(command))


def _shard(edit: Callable[[Path], Any], command: list[str] = VERIFY) -> Case:
    """A shard and, in the manifest, the sha256 and size that it has."""

    def case(folder: Path) -> list[str]:
        path = folder / "store" / "shard-00000.safetensors"
        edit(path)
        if path.is_file() and not path.is_symlink():
            entry = {"bytes": path.stat().st_size, "content_sha256": checkpoints.file_sha256(path)}
            edit_sealed(folder / "store" / MANIFEST_NAME, lambda content: content["shards"][path.name].update(entry))
        return command

    return case


def _link(target: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return edit


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _lying_zip(path: Path) -> None:
    """A file of torch.save whose pickle claims a storage larger than its record."""
    torch.save({"pos_embed": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"K\x04tq", b"J\x00\x00\x00\x10tq") if name.endswith("pkl") else data)


def _inflating_zip(path: Path) -> None:
    """A file of torch.save whose record is deflated: 2 GiB of zeros in 2 MB."""
    torch.save({"pos_embed": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
                for _ in range(2048 if "data/0" in name else 0):
                    file.write(bytes(1 << 20))


def _runs_code(path: Path) -> None:
    class Runs:
        def __reduce__(self):
            return os.mkdir, ("victim/taken",)

    path.write_bytes(pickle.dumps({"model": Runs()}))


def _remove_and(write: Callable[[Path], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.unlink()
        write(path)

    return edit


def _index(folder: Path) -> list[str]:
    (folder / "dit" / WEIGHTS_NAME).unlink()
    index = folder / "dit" / f"{WEIGHTS_NAME}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../teacher.safetensors"}}))
    return ["export", "dit", *PUBLIC]


def _replaced_folder(folder: Path) -> list[str]:
    shutil.rmtree(folder / "store")
    (folder / "store").symlink_to("/dev")
    return VERIFY


ZERO_WIDE = {"a": claim((1 << 40, 0))}
DEEP = "[" * 100_000
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(victim/taken) (w) file closefile\n%%EOF\n"

CASES: dict[str, Case] = {
    # images
    "image, EPS by name PNG": _image(EPS),
    "image, PPM by name PNG": _image(b"P6 8 8 255\n" + bytes(192)),
    "image, GIF by name PNG": _saved("GIF"),
    "image, TIFF by name PNG": _saved("TIFF"),
    "image, ICO by name PNG": _saved("ICO"),
    "image, PDF by name PNG": _saved("PDF"),
    "image, 1 x 60000": _image(png(1, 60000)),
    "image, 60000 x 1": _image(png(60000, 1)),
    "image, bomb of 16384 x 16384": _image(lambda path: path.write_bytes(png(16384, 16384))),
    "image, bomb of 30000 x 30000": _image(lambda path: path.write_bytes(png(30000, 30000))),
    "image, header of 2^31 x 2^31": _image(png(16, 16).replace(struct.pack(">II", 16, 16), b"\x7f\xff\xff\xff" * 2)),
    "image, 0 x 0": _image(png(16, 16).replace(struct.pack(">II", 16, 16), bytes(8))),
    "image, empty": _image(b""),
    "image, text": _image(b"not an image"),
    "image, cut PNG": _cut("PNG"),
    "image, cut JPEG": _cut("JPEG"),
    "image, cut WEBP": _cut("WEBP"),
    "image, cut BMP": _cut("BMP"),
    "image, BMP that claims 65000 x 65000": _image(
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 65000, 65000, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "image, 16 bits": _image(png(16, 16, bits=16)),
    "image, wrong checksum": _image(png(16, 16)[:-20] + bytes(20)),
    "image, name of two lines": _image(b"", "x\ny.png"),
    # VAE
    **{
        f"VAE, scaling_factor {value}": _vae(scaling_factor=value)
        for value in (float("nan"), float("inf"), 0, -1.0, "0.18", True, None, [1])
    },
    "VAE, 10^9 channels": _vae(block_out_channels=[10**9, 8]),
    "VAE, 4096 channels": _vae(block_out_channels=[4096, 4096]),
    "VAE, 10^7 layers": _vae(layers_per_block=10**7),
    "VAE, channels are text": _vae(block_out_channels="888"),
    "VAE, latents of 10^9 channels": _vae(latent_channels=10**9),
    "VAE, quantised": _vae(quantization_config={"quant_method": "bitsandbytes"}),
    "VAE, empty config": _on("vae/config.json", lambda path: path.write_text(""), LATENTS),
    "VAE, deep config": _on("vae/config.json", lambda path: path.write_text(DEEP), LATENTS),
    "VAE, empty weights": _on(f"vae/{WEIGHTS_NAME}", lambda path: path.write_bytes(b""), LATENTS),
    "VAE, weights are NaN": _on(
        f"vae/{WEIGHTS_NAME}", lambda path: edit_tensors(path, quant_conv__bias=torch.full((8,), torch.nan)), LATENTS
    ),
    "VAE, latents overflow float16": _vae(scaling_factor=1e30),
    # sample.json
    "sample.json, another folder": _sample_json('{"file": "../victim/private.npz"}'),
    "sample.json, absolute": _sample_json('{"file": "/dev/zero"}'),
    "sample.json, parent": _sample_json('{"file": ".."}'),
    "sample.json, empty name": _sample_json('{"file": ""}'),
    "sample.json, NUL": _sample_json('{"file": "a\\u0000b"}'),
    "sample.json, number": _sample_json('{"file": 1}'),
    "sample.json, list": _sample_json("[]"),
    "sample.json, empty": _sample_json(""),
    "sample.json, deep": _sample_json(DEEP),
    "sample.json, no file": _sample_json("{}"),
    "sample.json, of 100 GiB": _on("samples/sample.json", lambda path: sparse(path, 100 << 30), EVALUATE),
    "sample.json, pipe": _on("samples/sample.json", _fifo, EVALUATE),
    # .npz
    "npz, empty": _samples(lambda path: path.write_bytes(b"")),
    "npz, cut": _samples(lambda path: path.write_bytes(path.read_bytes()[:700])),
    "npz, byte changed": _samples(
        lambda path: path.write_bytes(path.read_bytes()[:300] + b"\xff\x00\xff" + path.read_bytes()[303:])
    ),
    "npz, pipe": _samples(_fifo),
    "npz, 6 GiB of zeros": _samples(lambda path: npz(path, 6 << 30, arr_0=npy("|u1", (1 << 21, 32, 32, 3)))),
    "npz, header of 2^40": _samples(lambda path: npz(path, arr_0=npy("|u1", (1 << 40, 8, 8, 1), bytes(64)))),
    "npz, one image of 2^30": _samples(lambda path: npz(path, arr_0=npy("|u1", (2, 1 << 15, 1 << 15, 1)))),
    "npz, image of 200 MB": _samples(lambda path: npz(path, 2 * 10**8, arr_0=npy("|u1", (2, 10**4, 10**4, 1)))),
    "npz, negative shape": _samples(lambda path: npz(path, arr_0=npy("|u1", (-2, -8, 8, 1), bytes(128)))),
    "npz, header of text": _samples(lambda path: npz(path, arr_0=npy("", "", header="__import__('os')"))),
    "npz, deep header": _samples(lambda path: npz(path, arr_0=npy("", "", header="(" * 9000))),
    "npz, version 2 of 3 GiB": _samples(
        lambda path: npz(path, 3 << 30, arr_0=b"\x93NUMPY\x02\x00" + struct.pack("<I", 3 << 30))
    ),
    "npz, version 9": _samples(lambda path: npz(path, arr_0=npy("|u1", (2, 2, 2, 1), bytes(8), b"\x09\x00"))),
    "npz, objects": _samples(lambda path: path.write_bytes(stored(arr_0=np.array([{}], dtype=object)))),
    "npz, bzip2": _samples(
        lambda path: npz(path, method=zipfile.ZIP_BZIP2, arr_0=npy("|u1", (2, 8, 8, 1), bytes(128)))
    ),
    "npz, encrypted": _samples(
        lambda path: path.write_bytes(
            path.read_bytes()
            .replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
            .replace(b"PK\x01\x02-\x03-\x00\x00", b"PK\x01\x02-\x03-\x00\x01")
        )
    ),
    "npz, 10^6 channels": _samples(lambda path: npz(path, 4 * 10**6, arr_0=npy("|u1", (4, 1, 1, 10**6)))),
    "npz, labels of 2^40": _samples(
        lambda path: npz(path, arr_0=npy("|u1", (2, 8, 8, 1), bytes(128)), arr_1=npy("<i8", (1 << 40,), bytes(16)))
    ),
    "npz, labels of objects": _samples(
        lambda path: path.write_bytes(stored(arr_0=np.zeros((5, 8, 8, 1), np.uint8), arr_1=np.array([None] * 5)))
    ),
    "statistics, 3 GiB of zeros": _reference(
        lambda path: npz(path, 3 << 30, sigma=npy("<f8", (20066, 20066)), mu=npy("<f8", (20066,)))
    ),
    "statistics, text": _reference(lambda path: path.write_bytes(stored(mu=np.array(["a"]), sigma=np.eye(1)))),
    "statistics, count is a list": _reference(
        lambda path: path.write_bytes(stored(mu=np.zeros(64), sigma=np.eye(64), count=np.arange(3)))
    ),
    "statistics, huge numbers": _reference(
        lambda path: path.write_bytes(stored(mu=np.zeros(64), sigma=np.full((64, 64), 1e308)))
    ),
    "statistics, features of 100 MB": _reference(
        lambda path: npz(
            path,
            10**8,
            features=npy(f"<U{10**8 // 4}", ()),
            mu=npy("<f8", (1,), bytes(8)),
            sigma=npy("<f8", (1, 1), bytes(8)),
        )
    ),
    "statistics, empty": _reference(lambda path: path.write_bytes(b"")),
    "reference, damaged safetensors": _on(
        "student.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        ["evaluate", "samples", "--reference", "student.safetensors", "--out", "out/e.json"],
    ),
    "reference, images of 2^40": _on(
        "student.safetensors",
        lambda path: raw_safetensors(path, {"images": claim((1 << 40, 1, 8, 0))}),
        ["evaluate", "samples", "--reference", "student.safetensors", "--out", "out/e.json"],
    ),
    "reference, sparse images of 64 GiB": _on(
        "student.safetensors",
        lambda path: (
            raw_safetensors(path, {"images": claim((2, 4, 1 << 16, 1 << 16), "F16", (0, 1 << 36))}),
            sparse(path, path.stat().st_size + (1 << 36), path.read_bytes()),
        ),
        ["evaluate", "student.safetensors", "--reference", "student.safetensors", "--out", "out/e.json"],
    ),
    # weights
    "student, empty": _student(lambda path: path.write_bytes(b"")),
    "student, cut": _student(lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "student, header of 2^60": _student(lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")),
    "student, header of 90 MB of nothing": _student(lambda path: sparse(path, 90 << 20, struct.pack("<Q", 89 << 20))),
    "student, shape beyond the file": _student(lambda path: raw_safetensors(path, {"a": claim((1 << 40,))})),
    "student, empty tensors": _student(lambda path: raw_safetensors(path, ZERO_WIDE)),
    "student, is a pipe": _student(_fifo),
    "student, is /dev/zero": _student(_link("/dev/zero")),
    "student, 1 TiB of a file": _student(
        lambda path: (
            raw_safetensors(path, {"a": claim((1 << 38,), "F32", (0, 1 << 40))}),
            sparse(path, path.stat().st_size + (1 << 40), path.read_bytes()),
        )
    ),
    "student, blocks.300000": _student(lambda path: edit_tensors(path, blocks__300000__x=torch.zeros(1))),
    "student, blocks.999": _student(lambda path: edit_tensors(path, blocks__999__x=torch.zeros(1))),
    "student, block of 5000 digits": _student(
        lambda path: edit_tensors(path, **{"blocks." + "9" * 5000 + ".x": torch.zeros(1)})
    ),
    "student, final_layer500000": _student(lambda path: edit_tensors(path, final_layer500000__x=torch.zeros(1))),
    "student, final_layer0": _student(lambda path: edit_tensors(path, final_layer0__x=torch.zeros(1))),
    "student, positions of no width": _student(lambda path: edit_tensors(path, pos_embed=torch.zeros(1, 1 << 40, 0))),
    "student, classes of no width": _student(
        lambda path: edit_tensors(path, y_embedder__embedding_table__weight=torch.zeros(1 << 60, 0))
    ),
    "student, tall and wide": _student(
        lambda path: edit_tensors(
            path, pos_embed=torch.zeros(1, 1 << 20, 1), x_embedder__proj__weight=torch.zeros(1 << 20, 1, 1, 1)
        )
    ),
    "student, of another dtype": _student(
        lambda path: save_file({k: t.to(torch.uint8) for k, t in load_file(path).items()}, path)
    ),
    "student, is a teacher": _on("teacher.safetensors", Path.exists, ["sample", "teacher.safetensors", *SAMPLE]),
    "pt, empty": _student(lambda path: path.write_bytes(b""), "s.pt"),
    "pt, one byte": _student(lambda path: path.write_bytes(b"\x80"), "s.pt"),
    "pt, text": _student(lambda path: path.write_bytes(b"hello, world"), "s.pt"),
    "pt, start of a zip": _student(lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "s.pt"),
    "pt, cut": _student(
        lambda path: (torch.save({"a": torch.zeros(9)}, path), path.write_bytes(path.read_bytes()[:300])), "s.pt"
    ),
    "pt, old and cut": _student(
        lambda path: (
            torch.save({"a": torch.zeros(9)}, path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:200]),
        ),
        "s.pt",
    ),
    "pt, runs code": _student(_runs_code, "s.pt"),
    "pt, storage beyond its record": _student(_lying_zip, "s.pt"),
    "pt, 2 GiB deflated": _student(_inflating_zip, "s.pt"),
    "pt, one number 2^34 times": _student(
        lambda path: torch.save({"pos_embed": torch.zeros(1).expand(1, 1 << 34, 1)}, path), "s.pt"
    ),
    "pt, on no device": _student(
        lambda path: torch.save({"pos_embed": torch.empty(1, 1 << 34, 1, device="meta")}, path), "s.pt"
    ),
    "pt, sparse tensor": _student(
        lambda path: torch.save({"pos_embed": torch.sparse_coo_tensor(size=(1 << 20, 1 << 20))}, path), "s.pt"
    ),
    "pt, names are numbers": _student(lambda path: torch.save({1: torch.zeros(1)}, path), "s.pt"),
    "teacher, empty, for distill": _teacher(lambda path: path.write_bytes(b"")),
    "teacher, blocks.300000, for distill": _teacher(lambda path: edit_tensors(path, blocks__300000__x=torch.zeros(1))),
    "teacher, final_layer2, for export": _on(
        "teacher.safetensors",
        lambda path: edit_tensors(path, final_layer500000__x=torch.zeros(1)),
        ["export", "teacher.safetensors", *DIFFUSERS, "-c", "recipe.yaml"],
    ),
    # diffusers folders
    "dit, 10^7 layers": _dit(num_layers=10**7),
    "dit, 100 layers": _dit(num_layers=100),
    "dit, sample_size 10^6": _dit(sample_size=10**6),
    "dit, heads of 10^12": _dit(attention_head_dim=10**12),
    "dit, 10^15 classes": _dit(num_embeds_ada_norm=10**15),
    "dit, 10^6 channels": _dit(in_channels=10**6),
    "dit, size is text": _dit(num_layers="2"),
    "dit, long class name": _dit(_class_name=CLASS_NAME * 10_000),
    "dit, norm_eps is a list": _dit(norm_eps=[1] * 10_000),
    "dit, empty config": _on("dit/config.json", lambda path: path.write_text(""), ["export", "dit", *PUBLIC]),
    "dit, deep config": _on("dit/config.json", lambda path: path.write_text(DEEP), ["export", "dit", *PUBLIC]),
    "dit, config of 100 GiB": _on("dit/config.json", lambda path: sparse(path, 100 << 30), ["export", "dit", *PUBLIC]),
    "dit, empty weights": _on(f"dit/{WEIGHTS_NAME}", lambda path: path.write_bytes(b""), ["export", "dit", *PUBLIC]),
    "dit, index to another folder": _index,
    # runs
    "run, part of another folder": _facts(lambda c: c["parts"].update({"../../../victim/private": "0" * 64})),
    "run, parts are a list": _facts(lambda c: c.update(parts=["ema"])),
    "run, step is text": _facts(lambda c: c.update(step="1")),
    "run, facts are a number": _facts(lambda c: c.update(facts=1)),
    "run, no model": _facts(lambda c: c["facts"].pop("model")),
    "run, model is a list": _facts(lambda c: c["facts"].update(model=[])),
    "run, 10^7 blocks": _facts(lambda c: c["facts"]["model"].update(depth=10**7)),
    "run, input of 10^12": _facts(lambda c: c["facts"]["model"].update(input_size=10**12)),
    "run, heads are text": _facts(lambda c: c["facts"]["model"].update(num_heads="2")),
    "run, 10^7 steps": _facts(lambda c: c["facts"]["student"].update(steps=10**7)),
    "run, 10^30 history layers": _facts(lambda c: c["facts"]["student"].update(history_layers=10**30)),
    "run, negative window": _facts(lambda c: c["facts"]["student"].update(window=-1)),
    "run, 10^7 blocks, for export": _facts(
        lambda c: c["facts"]["model"].update(depth=10**7), ("export", "run", *DIFFUSERS, "--segment", "0")
    ),
    "run, damaged": _on(
        "run/checkpoints/step-00000001/ema.safetensors", lambda path: path.write_bytes(b""), ["sample", "run", *SAMPLE]
    ),
    # stores
    "store, /dev/zero": _manifest(
        lambda c: (
            c["spec"].update(count=20),
            c["shards"].update({"/dev/zero": c["shards"]["shard-00001.safetensors"]}),
        )
    ),
    "store, another folder": _manifest(
        lambda c: c["shards"].update({"../victim/private.npz": c["shards"]["shard-00001.safetensors"]})
    ),
    "store, 2^50 trajectories": _spec(count=1 << 50),
    "store, 2^60 in one shard": _spec(count=1 << 60, shard_size=1 << 60),
    "store, 2^39 in shards of one": _spec(count=1 << 39, shard_size=1),
    "store, 2^1100 trajectories": _spec(count=1 << 1100),
    "store, one trajectory more": _spec(count=13),
    "store, fewer in the shard than said": _manifest(
        lambda c: (
            c["spec"].update(count=1 << 39, shard_size=1 << 39),
            c["shards"].pop("shard-00001.safetensors"),
            c["shards"]["shard-00000.safetensors"].update(count=1 << 39),
        )
    ),
    "store, -1 trajectories": _spec(count=-1),
    "store, count is text": _spec(count="12"),
    "store, count is true": _spec(count=True),
    "store, shards of 0": _spec(shard_size=0),
    "store, keep is a number": _spec(keep=3),
    "store, keep of 10^6": _spec(keep=list(range(10**6, 0, -1)), sampling_steps=10**6 + 1),
    "store, shape of text": _spec(image_shape=["a"]),
    "store, other shape": _spec(image_shape=[1, 8, 9]),
    "store, shape of 2^40": _spec(image_shape=[1 << 40, 1 << 40, 1 << 40]),
    "store, other dtype": _spec(dtype="float16"),
    "store, unknown key": _spec(__class__="x"),
    "store, spec is a list": _manifest(lambda c: c.update(spec=[])),
    "store, no spec": _manifest(lambda c: c.pop("spec")),
    "store, shards are a list": _manifest(lambda c: c.update(shards=["shard-00000.safetensors"])),
    "store, entry is a number": _manifest(lambda c: c["shards"].update({"shard-00000.safetensors": 1})),
    "store, sha256 is a number": _manifest(lambda c: c["shards"]["shard-00000.safetensors"].update(content_sha256=1)),
    "store, manifest is deep": _on(f"store/{MANIFEST_NAME}", lambda path: path.write_text(DEEP), VERIFY),
    "store, manifest is empty": _on(f"store/{MANIFEST_NAME}", lambda path: path.write_text(""), VERIFY),
    "store, manifest of 100 GiB": _on(f"store/{MANIFEST_NAME}", lambda path: sparse(path, 100 << 30), VERIFY),
    "store, manifest is a pipe": _on(f"store/{MANIFEST_NAME}", _fifo, VERIFY),
    "store, manifest is /dev/zero": _on(f"store/{MANIFEST_NAME}", _link("/dev/zero"), VERIFY),
    "store, is /dev": _replaced_folder,
    "store, shard is /dev/zero": _shard(_link("/dev/zero")),
    "store, shard is a pipe": _shard(_fifo),
    "store, shard is a link": _shard(_link("../victim/private.npz")),
    "store, shard is empty": _shard(lambda path: path.write_bytes(b"")),
    "store, shard is empty, for distill": _shard(lambda path: path.write_bytes(b""), DISTILL),
    "store, shard has fewer rows": _shard(
        lambda path: save_file({k: t[:4].clone() for k, t in load_file(path).items()}, path)
    ),
    "store, shard has fewer rows, for distill": _shard(
        lambda path: save_file({k: t[:4].clone() for k, t in load_file(path).items()}, path), DISTILL
    ),
    "store, shard lacks a tensor": _shard(
        lambda path: save_file({k: t for k, t in load_file(path).items() if k != "noise"}, path)
    ),
    "store, shard of another dtype": _shard(
        lambda path: save_file({k: t.to(torch.float64) for k, t in load_file(path).items()}, path)
    ),
    "store, label 10^9": _shard(lambda path: edit_tensors(path, labels=torch.full((8,), 10**9))),
    "store, label 10^9, for distill": _shard(lambda path: edit_tensors(path, labels=torch.full((8,), 10**9)), DISTILL),
    "store, label -1, for distill": _shard(lambda path: edit_tensors(path, labels=torch.full((8,), -1)), DISTILL),
    "store, states are NaN, for distill": _shard(
        lambda path: edit_tensors(path, **{k: t * torch.nan for k, t in load_file(path).items() if k != "labels"}),
        DISTILL,
    ),
    "store, 2^50 trajectories, for distill": _spec(DISTILL, count=1 << 50),
    "store, 2^50 latents, for finetune-gan": _spec(FINETUNE, "real", count=1 << 50),
    "store, latents of other shape, for finetune-gan": _spec(FINETUNE, "real", image_shape=[1, 8, 8, 1]),
    "student, empty, for finetune-gan": _on("student.safetensors", lambda path: path.write_bytes(b""), FINETUNE),
    "student, is a teacher, for finetune-gan": _on(
        "student.safetensors", lambda path: shutil.copy(path.with_name("teacher.safetensors"), path), FINETUNE
    ),
}
