"""What the documents say can be done is done here; what they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LONGEST = 200
# Results of every room, most of it made by benchmarks.report; a section for every op.
MAY_BE_LONG = {"performance.md", "ops.md"}


def code_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)


def anchors(document: Path) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_examples_of_the_ops_run():
    """In the order of the document, each with the names of those before it."""
    namespace = {}
    for block in code_blocks(ROOT / "docs" / "ops.md"):
        exec(compile(block, "docs/ops.md", "exec"), namespace)


def test_every_public_op_has_its_section():
    import ard_kernels

    sections = " ".join(re.findall(r"^## (.*)$", (ROOT / "docs" / "ops.md").read_text(), re.M))
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
