"""What `make cuda-build` reads from nvcc's and cuobjdump's texts, and what it must object to. No compiler is needed."""

import dataclasses
import json
import sys

import pytest

from benchmarks import build_tables, cuda_build, cuda_objects, observed_nvcc

FORWARD = "_ZN3ard12sm80_forwardINS_8bfloat16ELi72ELb1EEEvNS_15AttentionParamsE"
COPY = "_ZN3ard46_GLOBAL__N__ce375e98_8_probe_cu_abcbf7ee_229034copyINS_7float16ELi64ELb0EEEvNS0_1PE"

# Of nvcc 13.0 -Xptxas -v; the spill was planted.
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 227 registers, used 1 barriers, 1024 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 2.541 ms
ptxas info    : Compiling entry function '{COPY}' for 'sm_80'
ptxas info    : Function properties for {COPY}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90a'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 239 registers, used 1 barriers
"""

SASS = f"""\
\t\tFunction : {COPY}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*00f0*/                   LDG.E.NA.128.CONSTANT R4, [R6.64] ;                  /* 0x0000000406047981 */
                                                                                        /* 0x000ea2000c1e1d00 */
        /*0100*/              @!P0 LDG.E R5, [R2.64] ;                                  /* 0x00400000020f7fae */
        /*0110*/              @!P0 STG.E.128 [R2.64], R4 ;                              /* 0x0000000402007986 */
\t\t..........
\t\tFunction : {FORWARD}
        /*0100*/                   LDGSTS.E.BYPASS.128 [R15+0x400], [R2.64], !P0 ;      /* 0x00400000020f7fae */
        /*0110*/                   LDGDEPBAR ;                                          /* 0x00000000000079af */
        /*0140*/                   LDSM.16.M88.4 R8, [R15+0x400] ;                      /* 0x000400000f08783b */
        /*0160*/                   HMMA.16816.F32.BF16 R8, R8, R8, RZ ;                 /* 0x000000080808723c */
        /*0170*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;      /* 0x000000080808723c */
        /*0180*/          @!UP1    UTMALDG.4D [UR8], [UR4], desc[UR6] ;                 /* 0x000000080808723c */
        /*0190*/                   HMMA.16816.F32 R8, R8, R8, RZ ;                      /* 0x000000080808723c */
"""

ELF = f"""\
.section .nv.info.{COPY}
.nv.info.{COPY}
\t<0x1>
\tAttribute:\tEIATTR_KPARAM_INFO
\tFormat:\tEIFMT_SVAL
.nv.info.{FORWARD}
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x1 0x1
"""

GOOD = cuda_build.Row(
    source="block_causal_attention/sm80_forward.cu", kernel="sm80_forward<bfloat16, 72>", threads=128,
    registers=227, stack_bytes=0, spill_bytes=0, shared_bytes=0, blocks_per_sm=2, hmma=152, hgmma=0, ldsm=45,
    ldgsts=30, utmaldg=0, ldg128=2, stg128=9,
)  # fmt: skip
HOPPER = dataclasses.replace(GOOD, source="block_causal_attention/sm90.cu", hmma=0, hgmma=42, utmaldg=6)
ADALN = dataclasses.replace(GOOD, source="segment_adaln/forward.cu", kernel="adaln_forward<8>", hmma=0, ldgsts=0)
STAGED = dataclasses.replace(ADALN, ldg128=0, ldgsts=8)
UNALIGNED = dataclasses.replace(ADALN, kernel="adaln_forward<RowLayout<8, 8, false>, true, true>", ldg128=0)


def test_resources_are_read_per_architecture():
    assert cuda_objects.ptxas_report(REPORT, "80") == {
        FORWARD: {"registers": 227, "stack_bytes": 16, "spill_bytes": 20, "shared_bytes": 1024},
        COPY: {"registers": 18, "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 0},
    }
    assert list(cuda_objects.ptxas_report(REPORT, "90a")) == [FORWARD]


def test_instructions_are_counted():
    counts = cuda_objects.instruction_counts(SASS)
    one = dict.fromkeys(cuda_objects.INSTRUCTIONS, 0)
    assert counts[COPY] == one | {"ldg128": 1, "stg128": 1}
    assert counts[FORWARD] == one | {"hmma": 2, "hgmma": 1, "ldsm": 1, "ldgsts": 1, "utmaldg": 1}


def test_launch_bounds_are_read():
    assert cuda_objects.launch_bounds(ELF) == {FORWARD: 128}


def test_names_are_shortened():
    assert cuda_objects.short_names([FORWARD, COPY]) == ["sm80_forward<bfloat16, 72, true>", "copy<float16, 64, false>"]
    nested = "_ZN3ard12sm80_forwardINS_8bfloat16ENS_13ForwardTraitsILi72ELi128EEELb0EEEvNS_15AttentionParamsE"
    assert cuda_objects.short_names([nested]) == ["sm80_forward<bfloat16, ForwardTraits<72, 128>, false>"]


@pytest.mark.parametrize(
    ("row", "arch"), [(GOOD, "80"), (GOOD, "90a"), (HOPPER, "90a"), (ADALN, "80"), (STAGED, "80"), (UNALIGNED, "80")]
)
def test_a_good_row_passes(row, arch):
    assert cuda_build.problems(row, arch) == []


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (GOOD, {"spill_bytes": 8}, "spills 8 bytes"),
        (GOOD, {"stack_bytes": 32}, "keeps 32 bytes in local memory"),
        (GOOD, {"shared_bytes": 50000}, "50000 bytes of static shared memory; the limit is 49152"),
        (GOOD, {"blocks_per_sm": 0}, "227 registers x 128 threads do not fit"),
        (GOOD, {"hmma": 0}, "no HMMA"),
        (GOOD, {"ldsm": 0}, "no LDSM"),
        (GOOD, {"ldgsts": 0}, "no LDGSTS"),
        (HOPPER, {"hgmma": 0}, "no HGMMA"),
        (HOPPER, {"utmaldg": 0}, "no UTMALDG"),
        (ADALN, {"ldg128": 0, "ldgsts": 0}, "no LDG128/LDGSTS"),
        (UNALIGNED, {"stg128": 0}, "no STG128"),
        (ADALN, {"source": "history_attention/append.cu", "stg128": 0}, "no STG128"),
    ],
)
def test_a_bad_row_does_not(row, change, message):
    assert cuda_build.problems(dataclasses.replace(row, **change), "90a") == [message]


def test_a_kernel_of_two_sources_is_named():
    (found,) = cuda_build.repeated_kernels({"a.cu": REPORT, "b.cu": REPORT.replace("ce375e98", "11111111")})
    assert found == "sm80_forward<bfloat16, 72, true> is compiled in a.cu, b.cu"
    assert cuda_build.repeated_kernels({"a.cu": REPORT}) == []


def test_a_change_that_the_table_does_not_know_fails(tmp_path):
    path, identity = tmp_path / "sm80.csv", ("source", "kernel")
    build_tables.write(path, "nvcc 13.0.88", cuda_build.Row, [GOOD])
    assert build_tables.compiler_of(path) == "nvcc 13.0.88"
    assert build_tables.differences(path, [GOOD], identity) == []
    (found,) = build_tables.differences(path, [dataclasses.replace(GOOD, registers=230)], identity)
    assert found.endswith("(table, now) {'registers': ('227', '230')}")
    assert "is not in the table" in build_tables.differences(path, [GOOD, ADALN], identity)[0]
    assert "in the table only" in build_tables.differences(path, [], identity)[0]
    assert build_tables.differences(path, [], identity, lambda line: line["source"] != GOOD.source) == []
    path.unlink()
    assert build_tables.compiler_of(path) is None
    assert "is not in the table" in build_tables.differences(path, [GOOD], identity)[0]


def test_a_digest_is_of_names_and_contents(tmp_path):
    a, b = tmp_path / "a.cu", tmp_path / "b.h"
    a.write_text("kernel"), b.write_text("header")
    before = build_tables.digest(tmp_path, [a, b])
    assert build_tables.digest(tmp_path, [b, a]) == before
    b.write_text("another")
    assert build_tables.digest(tmp_path, [a, b]) != before
    b.write_text("header")
    assert build_tables.digest(tmp_path, [a, b.rename(tmp_path / "c.h")]) != before


def test_the_digest_is_of_what_cuda_sources_include(tmp_path, monkeypatch):
    """Directly or not; headers of the CPU's kernels alone are none of it."""
    monkeypatch.setattr(cuda_build, "ROOT", tmp_path)
    judges = [f"benchmarks/{name}.py" for name in ("cuda_build", "cuda_objects", "observed_nvcc")]
    texts = dict.fromkeys([*judges, "CMakeLists.txt", "setup.py", "csrc/room/cpu.h", "csrc/common/last.h"], "")
    texts |= {"csrc/room/a.cu": '#include "near.h"\n', "csrc/room/near.h": '#include "../common/last.h"\n'}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = cuda_build.sources()
    (tmp_path / "csrc/room/cpu.h").write_text("// other")
    assert cuda_build.sources() == before
    (tmp_path / "csrc/common/last.h").write_text("// other")
    assert cuda_build.sources() != before


@pytest.mark.parametrize(
    ("compiler", "sources", "arguments", "built"),
    [
        ("nvcc 13.0.88", cuda_build.sources(), [], False),
        ("nvcc 13.0.88", cuda_build.sources(), ["--update"], True),
        ("nvcc 13.0.89", cuda_build.sources(), [], True),
        ("nvcc 13.0.88", "0123456789abcdef", [], True),
        ("nvcc 13.0.88", "", [], True),
    ],
)
def test_what_is_known_is_not_built_again(compiler, sources, arguments, built, tmp_path, monkeypatch, capsys):
    class Built(Exception):
        pass

    def build():
        raise Built

    for arch in cuda_build.ARCHITECTURES:
        build_tables.write(tmp_path / f"sm{arch}.csv", compiler, cuda_build.Row, [GOOD], sources)
    monkeypatch.setattr(cuda_build, "TABLES", tmp_path)
    monkeypatch.setattr(cuda_build, "nvcc", lambda: sys.executable)
    monkeypatch.setattr(cuda_build, "version_of", lambda nvcc: "13.0.88")
    monkeypatch.setattr(cuda_build, "build", build)
    monkeypatch.setattr(sys, "argv", ["cuda_build", *arguments])
    if built:
        with pytest.raises(Built):
            cuda_build.main()
    else:
        cuda_build.main()
        assert "nothing to build" in capsys.readouterr().out


def test_a_compiler_is_observed(tmp_path, capfd):
    """The launcher passes messages and status on, keeps ptxas' report to itself, and measures the compiler's memory."""
    compiler, target = tmp_path / "compiler.py", tmp_path / "kernel.o"
    compiler.write_text(
        "x = bytearray(300 << 20)\nprint('ptxas info    : Used 18 registers')\nprint('a warning')\nraise SystemExit(3)"
    )
    assert observed_nvcc.observe([sys.executable, str(compiler), "-o", str(target)]) == 3
    assert capfd.readouterr().err == "a warning\n"
    note = json.loads(target.with_suffix(".o.json").read_text())
    assert note["report"] == "ptxas info    : Used 18 registers\na warning\n"
    assert note["seconds"] > 0 and note["peak_bytes"] > 300 << 20


def test_an_object_that_took_too_much_memory_or_lacks_ptx(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_build, "cuobjdump", lambda *arguments: "PTX file    1: kernel.1.sm_80.ptx\n")
    note = {"peak_bytes": 1 << 30}
    assert cuda_build.object_problems("segment_adaln/forward.cu", tmp_path, note) == []
    (found,) = cuda_build.object_problems("segment_adaln/forward.cu", tmp_path, {"peak_bytes": 3 << 30})
    assert "nvcc took 3.0 GB" in found
    (found,) = cuda_build.object_problems("block_causal_attention/sm90.cu", tmp_path, note)
    assert "has PTX of ['sm_80']; expected []" in found
    monkeypatch.setattr(cuda_build, "cuobjdump", lambda *arguments: "")
    (found,) = cuda_build.object_problems("segment_adaln/forward.cu", tmp_path, note)
    assert "has PTX of []; expected ['sm_80']" in found


def test_the_committed_tables_are_of_the_sources():
    for arch in cuda_build.ARCHITECTURES:
        lines = (cuda_build.TABLES / f"sm{arch}.csv").read_text().splitlines()[2:]
        sources = {
            source.relative_to(cuda_build.ROOT / "csrc").as_posix() for source in cuda_build.ROOT.glob("csrc/*/*.cu")
        }
        if arch != "90a":
            sources = {source for source in sources if not cuda_build.is_hopper(source)}
        assert {line.split(",")[0] for line in lines} == sources
