"""A room's backends provide what its Protocol says; who imports whom."""

import ast
import inspect
from pathlib import Path

import pytest

import ard_kernels
from ard_kernels.block_causal_attention import dense, flash
from ard_kernels.block_causal_attention import op as attention
from ard_kernels.history_attention import op as history
from ard_kernels.qk_norm_rope import op as norm_rope
from ard_kernels.segment_adaln import op as adaln

PACKAGE = Path(ard_kernels.__file__).parent


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("op", [attention, history, norm_rope, adaln], ids=lambda op: op.__name__.split(".")[1])
def test_kernels_take_what_the_protocol_says(op):
    expected = {name: parameters(f) for name, f in vars(op.Kernels).items() if name in ("forward", "backward")}
    assert expected and {"cuda", "triton"} <= op.KERNELS.keys()
    for name, module in op.KERNELS.items():
        assert {what: parameters(getattr(module, what)) for what in expected} == expected, name


def test_dense_calls_take_what_the_protocol_says():
    names = ("attend", "attend_backward")
    expected = [parameters(getattr(dense.Dense, name)) for name in names]
    for kind in (dense.Matmuls, dense.FusedOnCpu, *flash.PACKAGES):
        assert [parameters(getattr(kind, name)) for name in names] == expected, kind


def imports(path: Path) -> set[str]:
    """Modules of ard_kernels that a file imports, at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ard_kernels"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if (PACKAGE.parent / (name.replace(".", "/") + ".py")).is_file() else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("ard_kernels")}
    return found


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("common", ()),
        ("block_causal_attention", ("common",)),
        ("segment_adaln", ("common",)),
        ("gelu", ("common",)),
        ("qk_norm_rope", ("common", "block_causal_attention")),
        ("history_attention", ("common", "block_causal_attention")),
    ],
)
def test_a_room_imports_only_what_it_stands_on(room, others):
    allowed = tuple(f"ard_kernels.{name}" for name in (room, *others, "version"))
    for path in (PACKAGE / room).glob("*.py"):
        assert all(name.startswith(allowed) for name in imports(path)), (path, imports(path))


def test_no_module_imports_itself_by_way_of_others():
    files = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): imports(path) for name, path in files.items()}
    done = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in modules[name]:
                visit(other, (*way, name))
        done.add(name)

    for name in modules:
        visit(name, ())
