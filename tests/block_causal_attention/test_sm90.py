"""The Hopper kernel's source, run by tests/emulator on CPU tensors; its layouts, which are plain index algebra."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
from oracle import assert_close

from ard_kernels.block_causal_attention.reference import block_causal_attention as reference
from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.block_causal_attention.tiles import make_tables

HEAD_DIMS = [64, 72, 80, 96, 128]
BLOCK_M = BLOCK_N = 128
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}


class HeadsView(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class TileTables(Structure):
    _fields_ = [("items", c_void_p), ("masked", c_void_p), ("bounds", c_void_p), ("tiles", c_int32), ("group", c_int32)]


class Params(Structure):
    """ard::AttentionParams."""

    _fields_ = [
        *((name, HeadsView) for name in ("q", "k", "v", "out")),
        ("lse", c_void_p),
        ("tables", TileTables),
        *((name, c_int32) for name in ("batch", "heads", "tokens")),
        ("scale", c_float),
        ("flip", c_uint32),
        ("workspace", c_void_p),
        *((name, c_int32) for name in ("splits", "tiles_per_split")),
    ]


class Layout(Structure):
    """ard::sm90::TileLayout; a group is first column, columns, swizzle."""

    _fields_ = [("rows", c_int), ("groups", c_int), ("group", c_int * 3 * 2)]


def build():
    """The kernel's objects, which the whole module of tests/emulator has too, and the driver, as one library."""
    sources = sorted((emulator.CSRC / "block_causal_attention").glob("sm90*.cu"))
    headers = sorted([*emulator.CSRC.rglob("*.h"), *emulator.HERE.glob("*.h")])
    emulator.BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        driver = Path(__file__).parent / "sm90_driver.cpp"
        objects = list(pool.map(lambda source: emulator._compile(source, headers), [*sources, driver]))
    library = emulator.BUILD / f"sm90-{emulator._digest(*objects)}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(partial)], check=True)
        partial.rename(library)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def sm90():
    functions = {
        "forward": (c_char_p, [POINTER(Params), c_int, c_int, c_int, c_uint64]),
        "serves": (c_bool, [POINTER(Params), c_int, c_int]),
        "bank_conflicts": (c_int64, []),
        "layout": (Layout, [c_int, c_bool, c_int]),
        "score_descriptor": (c_uint64, [POINTER(Layout), c_int]),
        "columns_below": (c_uint32, [c_int, c_int]),
        "value_descriptor": (c_uint64, [POINTER(Layout), c_int]),
    }
    library = build()
    for name, (result, arguments) in functions.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library


def heads_view(x):
    return HeadsView(x.data_ptr(), *x.stride()[:3])


def params(q, k, v, out, lse, tables, group, scale):
    (B, H, T, _), (items, masked, bounds) = q.shape, tables
    pointers = TileTables(items.ctypes.data, masked.ctypes.data, bounds.ctypes.data, len(items), group)
    scale = max(scale * 1.4426950408889634, np.finfo(np.float32).tiny)
    return Params(*map(heads_view, (q, k, v, out)), lse.data_ptr(), pointers, B, H, T, scale, 0, None, 1, 0)


def run(sm90, q, k, v, lengths, mask, scale=None, multiprocessors=3, seed=0, group=None):
    """(out, lse); both start as NaN, and so does what lies around `out`."""
    B, H, T, D = q.shape
    out = q.new_full((B, T + 2, H, D), float("nan"))
    lse = torch.full((B, H, T), float("nan"))
    tables = make_tables(lengths, T, *mask, BLOCK_M, BLOCK_N, False)
    arguments = params(
        q, k, v, out[:, 1:-1].transpose(1, 2), lse, tables, group or B * H, D**-0.5 if scale is None else scale
    )
    assert sm90.serves(ctypes.byref(arguments), DTYPES[q.dtype], D)
    error = sm90.forward(ctypes.byref(arguments), DTYPES[q.dtype], D, multiprocessors, seed)
    assert not error, error.decode()
    assert sm90.bank_conflicts() == 0
    assert out[:, [0, -1]].isnan().all(), "wrote rows that are not its own"
    return out[:, 1:-1].transpose(1, 2), lse


def packed(B, H, T, D, dtype):
    return (x.transpose(1, 2) for x in torch.randn(B, T, 3, H, D, dtype=dtype).unbind(2))


def check(sm90, q, k, v, lengths, mask, scale=None, **options):
    out, lse = run(sm90, q, k, v, lengths, mask, scale, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = reference(q, k, v, lengths, *mask, scale=scale)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~dense_mask(lengths, q.shape[2], *mask), float("-inf"))
    assert_close(out, scores.softmax(-1) @ v, expected, label="out")
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    return out, lse


CASES = {"equal": ([64], 192), "across": ([50, 70, 91], 211), "full": ([128], 256), "ragged": ([1, 3, 130, 100], 234)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_values(sm90, D, mask, dtype):
    for lengths, T in CASES.values():
        check(sm90, *packed(1, 2, T, D, dtype), lengths, mask)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("mask", [MASKS["M2"], MASKS["M4"]], ids=["M2", "M4"])
def test_bit_equal_in_every_order_and_distribution(sm90, D, mask):
    """Thread orders, landing times, and few or many blocks: nothing of it shows in a single bit."""
    q, k, v = packed(2, 3, 300, D, torch.bfloat16)
    first = check(sm90, q, k, v, [100], mask, multiprocessors=18)
    for seed, multiprocessors, group in ((1, 1, 6), (2, 4, 4), (3, 7, 1), (4, 100, 2)):
        again = run(sm90, q, k, v, [100], mask, multiprocessors=multiprocessors, seed=seed, group=group)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("D", [64, 72])
def test_ring_wraps(sm90, D):
    """More key tiles in an item than the ring has stages, several times around."""
    check(sm90, *packed(1, 1, 1290, D, torch.float16), [1290], (None, 0), multiprocessors=2, seed=5)


@pytest.mark.parametrize(("lengths", "T"), [([1], 1), ([7], 21), ([129], 129), ([1], 9)], ids=str)
def test_fewer_tokens_than_a_tile(sm90, lengths, T):
    for mask in MASKS.values():
        check(sm90, *packed(2, 1, T, 72, torch.bfloat16), lengths, mask)


def test_contiguous_strided_and_offset_inputs(sm90):
    leaf = torch.randn(3, 2, 2, 2 * 140 + 1, 80, dtype=torch.bfloat16)
    check(sm90, *leaf[:, :, :, 1::2, 8:].unbind(0), [70], (None, 0))
    check(sm90, *(x.contiguous() for x in leaf[:, :, :, 1::2, 8:].unbind(0)), [70], (None, 0))


def test_what_lies_behind_a_row_is_not_read(sm90):
    """Columns 72 to 79 of the padded tile are zeros, not the next head's numbers."""
    leaf = torch.full((1, 130, 3, 80), float("nan"), dtype=torch.bfloat16)
    leaf[..., :72] = torch.randn(1, 130, 3, 72)
    check(sm90, *(x[:, None, :, :72] for x in leaf.unbind(2)), [130], (None, 0))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_any_scale(sm90, scale):
    for lengths, T in CASES.values():
        check(sm90, *packed(1, 1, T, 72, torch.float16), lengths, (2, 0), scale)


def test_large_scores(sm90):
    q, k, v = packed(1, 1, 256, 72, torch.bfloat16)
    check(sm90, 30 * q, 30 * k, v, [64], (None, 0))


def test_what_it_refuses(sm90):
    q, k, v = packed(2, 2, 64, 72, torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(2, 2, 64)
    tables = make_tables([64], 64, None, 0, BLOCK_M, BLOCK_N, False)

    def serves(q=q, dtype=1, D=72, out=out, **fields):
        arguments = params(q, k, v, out, lse, tables, 4, 0.1)
        for name, value in fields.items():
            setattr(arguments, name, value)
        return sm90.serves(ctypes.byref(arguments), dtype, D)

    assert serves()
    assert not serves(dtype=0) and not serves(D=88)
    assert not serves(flip=0x80008000) and not serves(splits=2)
    wide = torch.empty(2, 2, 65, 76, dtype=torch.bfloat16)
    assert not serves(q=wide[:, :, :64, :72]), "row stride 76"
    assert not serves(q=wide.view(-1)[4:][: 2 * 2 * 64 * 72].view(2, 2, 64, 72)), "address 8 bytes off"
    assert not serves(q=q[:, :1].expand(2, 2, 64, 72)), "stride 0"
    assert not serves(out=wide[:, :, :64, :72])
    single = torch.empty(1, 1, 64, 72, dtype=torch.bfloat16).as_strided((1, 1, 64, 72), (0, 7, 72, 1))
    assert serves(q=single, batch=1, heads=1), "the stride of a dimension of one element does not matter"


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("values", [False, True], ids=["scores", "values"])
def test_tile_layout(sm90, D, values):
    """Every element has its own place; boxes and descriptors agree with it; eight rows of a chunk fill all banks."""
    tile = sm90.layout(D, values, BLOCK_N)
    groups = [tuple(tile.group[g]) for g in range(tile.groups)]
    columns = -(-D // 16) * 16
    assert sum(group[1] for group in groups) == columns and groups[0][0] == 0
    place = np.array([[sm90.offset(ctypes.byref(tile), r, c) for c in range(columns)] for r in range(BLOCK_N)])
    assert len(np.unique(place)) == place.size and (place % 2 == 0).all()
    assert place.min() == 0 and place.max() + 2 == sm90.tile_bytes(ctypes.byref(tile)) == 2 * BLOCK_N * columns
    for start in range(0, columns, 8):
        assert (np.diff(place[:, start : start + 8], axis=1) == 2).all(), "16-byte chunks stay whole"
        banks = place[:, start].reshape(-1, 8) // 16 % 8
        assert (np.sort(banks, axis=1) == np.arange(8)).all()
    for g, (first, width, swizzle) in enumerate(groups):
        assert width * 2 % swizzle == 0 and place[0, first] % (8 * swizzle) == 0, "a pattern starts the group"
        bits = sm90.value_descriptor(ctypes.byref(tile), g)
        leading, stride = (bits >> 16 & 0x3FFF) * 16, (bits >> 32 & 0x3FFF) * 16
        assert stride == 8 * swizzle and bits >> 62 == {128: 1, 64: 2, 32: 3}[swizzle]
        if width * 2 > swizzle:
            assert leading == place[0, first + swizzle // 2] - place[0, first]
    for step in range(columns // 16):
        start = sm90.step_offset(ctypes.byref(tile), step)
        assert start == place[0, 16 * step], "row 0 is not permuted"
        bits = sm90.score_descriptor(ctypes.byref(tile), step)
        assert (bits >> 32 & 0x3FFF) * 16 == place[8, 16 * step] - start, "groups of 8 rows"


def test_fragments_cover_the_tile(sm90):
    held = {(sm90.accumulator_row(t, i), sm90.accumulator_column(t, i)) for t in range(128) for i in range(64)}
    assert held == {(r, c) for r in range(64) for c in range(128)}


def test_columns_below(sm90):
    for thread in range(4):
        columns = [sm90.accumulator_column(thread, i // 2 * 4 + i % 2) for i in range(32)]
        for stop in range(-140, 280):
            below = sum(1 << i for i, column in enumerate(columns) if column < stop)
            assert sm90.columns_below(thread, stop) == below


@pytest.mark.parametrize(("D", "expected"), [(64, 4), (72, 4), (80, 4), (96, 3), (128, 2)])
def test_stages(sm90, D, expected):
    assert sm90.stages(D) == expected
