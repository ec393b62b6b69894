"""What the documents say can be done is done here; what they point to is there."""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ard_kernels
from ard_kernels import qk_norm_rope

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LONGEST = 200
MAY_BE_LONG = {"performance.md"}  # results of every room, most of it made by benchmarks.report
OPS = [ROOT / "docs" / name for name in ("ops.md", "history.md", "norms.md")]


def code_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)


def anchors(document: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_examples_of_the_ops_run():
    """In the order of the documents, each with the names of those before it."""
    namespace = {}
    for document in OPS:
        for block in code_blocks(document):
            exec(compile(block, document.name, "exec"), namespace)


def test_the_stream_of_the_readme_runs():
    """And its frames are those of a model that sees all frames of its window and sink afresh."""
    (block,) = [block for block in code_blocks(ROOT / "README.md") if "def stream(" in block]
    sizes = {"layers": 2, "batch": 1, "heads": 2, "head_dim": 16, "L": 4}
    linear, frequency = torch.nn.Linear(32, 96), 10.0 ** -(torch.arange(8) / 8)
    weights = SimpleNamespace(q=torch.rand(32) + 0.5, k=torch.rand(32) + 0.5)

    def rope(frame):
        angle = (frame + torch.arange(4)[:, None] / 4) * frequency
        return angle.cos(), angle.sin()

    def model(x, t, attend):
        for layer in range(2):
            q, k, v = linear(x + t).unflatten(-1, (3, 2, 16)).unbind(2)
            x = x + attend(layer, q, k, v, weights).flatten(2)
        return x

    names = {"pairwise": pairwise, "partial": partial, "torch": torch, "rope": rope, **vars(ard_kernels), **sizes}
    exec(compile(block, "README.md", "exec"), names)
    noise, times = torch.randn(12, 1, 4, 32), (1.0, 0.5, 0.0)
    frames = list(names["stream"](model, noise, times))
    assert names["cache"].segments == [12, 12] and len(frames) == 12

    past = [[], []]  # per layer: normalised and not rotated keys, values

    def afresh(layer, q, k, v, norm, frame, commit):
        own = [qk_norm_rope(q, k, over="all", q_weight=norm.q, k_weight=norm.k, layout="bthd"), v]
        (q, k), v = own
        seen = [j for j in range(frame) if j < 1 or j > frame - 6]
        keys, values = zip(*[past[layer][j] for j in seen], (k, v), strict=True)
        q, *keys = (
            qk_norm_rope(x, None, *rope(at), norm=None, layout="bthd")
            for x, at in zip((q, *keys), (len(seen), *range(len(seen) + 1)), strict=True)
        )
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, torch.cat(keys, 1), torch.cat(values, 1)))
        )
        if commit:
            past[layer].append((k, v))
        return out.transpose(1, 2)

    names["attend"] = afresh
    for got, expected in zip(frames, names["stream"](model, noise, times), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_every_public_op_has_its_section():
    sections = " ".join(re.findall(r"^## (.*)$", "".join(path.read_text() for path in OPS), re.M))
    ops = [name for name in ard_kernels.__all__ if callable(vars(ard_kernels)[name]) and name[0].islower()]
    assert {name for name in ops if f"`{name}(" not in sections} == {"backends", "use_backend"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_length(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"https?://", target):
            file, _, anchor = target.partition("#")
            path = document.parent / file if file else document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
    if document.name not in MAY_BE_LONG:
        assert len(document.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    """Paths in backticks that look like files of the repository."""
    folders = "ard_kernels|benchmarks|csrc|docs|python|testing|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", document.read_text()):
        assert (ROOT / path).exists(), path
