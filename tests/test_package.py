"""What a user gets from the package itself: light imports, the doctor, the build's environment variables, the sdist."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

import ard_kernels
from ard_kernels.common import extension

ROOT = Path(__file__).parents[1]


def run_python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout + done.stderr


def test_import_needs_only_torch_and_numpy():
    """Every other package of the environment is made unimportable; what torch itself loads is let be."""
    code = """
import sys, time, torch, numpy, torch.utils.flop_counter
before = set(sys.modules)
for name in ("typer", "rich", "yaml", "safetensors", "sklearn", "scipy", "matplotlib", "hypothesis", "pytest", "ard"):
    sys.modules[name] = None
start = time.perf_counter()
import ard_kernels
print(time.perf_counter() - start)
allowed = {"ard_kernels", "torch", "numpy"} | set(sys.stdlib_module_names)
print({name.split(".")[0] for name in set(sys.modules) - before if sys.modules[name] is not None} - allowed)
"""
    status, output = run_python("-c", code)
    assert status == 0, output
    seconds, foreign = output.strip().splitlines()
    assert foreign == "set()"
    assert float(seconds) < 0.6  # 0.1 alone; the compiler with it would take seconds


def test_only_the_digits_need_scikit_learn():
    code = """
import importlib, pkgutil, sys
sys.modules["sklearn"] = sys.modules["diffusers"] = None  # diffusers takes long, and the pipeline alone is made of it
import ard
for module in pkgutil.walk_packages(ard.__path__, "ard."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert "needs diffusers" in str(error) and module.name.endswith("pipeline"), module.name
ard.evaluation.features.load_features("pooled")
try:
    ard.data.digits.load()
except ModuleNotFoundError as error:
    print(error.name)
"""
    status, output = run_python("-c", code)
    assert status == 0, output
    assert output.split() == ["sklearn.datasets"]


def test_doctor():
    """`ard doctor`, the same: tests/student/test_flops_cli.py."""
    status, output = run_python("-m", "ard_kernels.doctor")
    assert status == 0, output
    for word in ("torch ", "extension: ard_kernels._C", "gate_residual_adaln", "refused: ", "available"):
        assert word in output


@pytest.mark.parametrize("capability, isa", [("avx2", "avx2"), ("default", "baseline")])
def test_the_variable_that_restrains_pytorchs_kernels_restrains_ours(capability, isa):
    if extension.module is None or isa not in extension.module.cpu_isas():
        pytest.skip(f"no {isa} kernels here")
    status, output = run_python("-m", "ard_kernels.doctor", ATEN_CPU_CAPABILITY=capability)
    assert status == 0 and f"compiled for and running {isa}" in output, output


def run_setup(folder, **environment):
    """The build with nothing on PATH but `folder`, so that it ends where cmake would be called at the latest."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    defaults = {"PATH": str(folder), "CUDA_HOME": "", "CUDA_PATH": "", "ARD_SANITIZE": "0", "ARD_CUDA_ARCHS": ""}
    status, output = run_python(*arguments, **defaults | environment)
    assert status != 0
    return output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ARD_BUILD_CUDA": "1"}, "ARD_BUILD_CUDA=1 needs nvcc, and none is on PATH"),
        ({"ARD_BUILD_CUDA": "yes"}, "ARD_BUILD_CUDA is 'yes'; expected auto, 0 or 1"),
        ({"ARD_BUILD_CUDA": "1", "ARD_SANITIZE": "1"}, "sanitizer builds have no CUDA kernels"),
        ({"ARD_CUDA_ARCHS": "80;sm_90"}, "ARD_CUDA_ARCHS is '80;sm_90'; expected architectures from 80 on"),
        ({"ARD_CUDA_ARCHS": "75"}, "ARD_CUDA_ARCHS is '75'; expected architectures from 80 on"),
    ],
)
def test_build_cuda_is_read(environment, message, tmp_path):
    assert message in run_setup(tmp_path, **environment)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo Cuda compilation tools, release 11.8, V11.8.89", "is of CUDA 11.8; 12.5 or newer is needed"),
        ("echo no such licence >&2; exit 1", "nvcc --version says nothing of a release: no such licence"),
        (
            '[ "$1" = --version ] && echo release 12.8 && exit 0; echo unsupported GNU version >&2; exit 1',
            "nvcc cannot compile an empty kernel for 80, 90a: unsupported GNU version",
        ),
    ],
)
def test_a_compiler_that_cannot_build_is_named(script, problem, tmp_path):
    """auto says so in one line and goes on without CUDA; 1 fails with the reason; 0 does not look."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    said = "ard-kernels: building without CUDA kernels: "
    (line,) = (line for line in run_setup(tmp_path, ARD_BUILD_CUDA="auto").splitlines() if line.startswith(said))
    assert problem in line
    output = run_setup(tmp_path, ARD_BUILD_CUDA="1")
    assert "ARD_BUILD_CUDA=1: " in output and problem in output and said not in output
    assert problem not in run_setup(tmp_path, ARD_BUILD_CUDA="0")


def test_backend_from_the_environment():
    code = """
import os, torch
for name in ("torch", "triton"):
    child = os.fork()  # it is read at the import
    if not child:
        os.environ["ARD_BACKEND"] = name
        import ard_kernels
        x = torch.randn(1, 2, 8)
        try:
            print(name, ard_kernels.gate_residual(x, x, x, segment_length=1).shape, flush=True)
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    status, output = run_python("-c", code, TRITON_INTERPRET="0")
    served, refused = output.splitlines()
    assert status == 0 and served == "torch torch.Size([1, 2, 8])"
    assert "'triton' (environment ARD_BACKEND) cannot run" in refused


def test_without_another_python_its_job_says_that_it_is_skipped():
    command = ["make", "test-other-python", "OTHER_PYTHON="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SKIPPED test-other-python: no Python 3.12" in done.stderr
    assert "make test-other-python" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "answer"),
    [
        ([], 2, "Usage:"),
        (["--help"], 0, "finetune-gan"),
        (["distill", "--help"], 0, "--dry-run"),
        (["--version"], 0, f"ard-kernels {ard_kernels.__version__}, torch {metadata.version('torch')}, Python 3."),
        (["distil"], 2, "No such command 'distil'"),
        (["distill", "--stepps", "3"], 2, "No such option: --stepps"),
        (["sample", "run", "--out", "samples", "--count", "0"], 2, "--count"),
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments, status, answer):
    """--help takes 0.3 s without torch, and more than 1.8 s with it; 10 s are for a busy machine."""
    code = f"""
import sys
from ard.__main__ import main
sys.argv = ["ard", *{arguments}]
try:
    main()
finally:
    print("modules:", *sorted({{"torch", "numpy", "sklearn", "PIL"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == status, done.stderr
    assert answer in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].strip() == "modules:"


def test_public_names_of_ard():
    """They come at their first use; what is no name of it is an AttributeError, as of any module."""
    import ard

    for name in ard.__all__:
        assert issubclass(getattr(ard, name), torch.nn.Module) or name == "DiTConfig"
    with pytest.raises(AttributeError, match="'ard' has no attribute 'Dit'"):
        ard.Dit  # noqa: B018


def tracked_files():
    """Of the clone; an unpacked sdist has no list of its own."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    command = ["git", "ls-files"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.fixture(scope="module")
def sdist_files(tmp_path_factory):
    """What setuptools would put into the sdist, but for the metadata that it makes."""
    folder = tmp_path_factory.mktemp("egg")
    status, output = run_python("setup.py", "-q", "egg_info", "--egg-base", str(folder))
    assert status == 0, output
    names = set((folder / "ard_kernels.egg-info" / "SOURCES.txt").read_text().splitlines())
    return {name for name in names if ".egg-info/" not in name}


def test_sdist_has_every_file_of_the_repository(sdist_files):
    tracked = tracked_files()
    assert tracked - sdist_files == set()
    untracked = sdist_files - tracked
    ignored = subprocess.run(["git", "check-ignore", *untracked], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(ignored.splitlines()) == set(), "build products in the sdist"


def test_packages_are_typed_and_have_their_data(tmp_path):
    """Of both packages everything but the C++ module, which is built apart, gets into the wheel."""
    status, output = run_python("setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    assert status == 0, output
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"ard/py.typed", "ard_kernels/py.typed", "ard/configs/digits.yaml", "ard_kernels/tuned/sm90.json"} <= built
    tracked = (name.removeprefix("python/") for name in tracked_files())
    assert {name for name in tracked if name.startswith(("ard/", "ard_kernels/"))} <= built


def test_every_environment_variable_is_documented():
    """docs/environment.md has what any file reads, and nothing else of ours; tests may set what they like."""
    read = re.compile(r"(?:environ(?:\.get|\.pop|\.setdefault)?|getenv)[\[(]\s*[\"'](\w+)[\"']")
    sources = {ROOT / name for name in tracked_files() if name.endswith((".py", ".h", ".cpp", ".cu"))}
    found = {variable for path in sources for variable in read.findall(path.read_text())}
    ours = {variable for variable in found if variable.startswith(("ARD_", "GPU_"))}
    assert {"ARD_BACKEND", "ARD_DISPATCH", "ARD_BUILD_CUDA", "GPU_MINUTES"} <= ours, "the pattern finds nothing"
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    documented = {variable for row in rows for variable in re.findall(r"`(\w+)`", row)}
    assert ours <= documented, f"not in docs/environment.md: {sorted(ours - documented)}"
    assert {name for name in documented if name.startswith(("ARD_", "GPU_"))} == ours, "documented, and read nowhere"


def test_the_version_stands_once():
    version = (ROOT / "ard_kernels" / "version.py").read_text()
    assert f'"{ard_kernels.__version__}"' in version
    status, output = run_python("setup.py", "--version")
    assert status == 0 and output.split()[-1] == ard_kernels.__version__
    for name in ("pyproject.toml", "setup.py", "ard_kernels/__init__.py", "python/ard/cli/base.py", "CITATION.cff"):
        assert ard_kernels.__version__ not in (ROOT / name).read_text(), name


def make_targets(text):
    """Names after `make` in a script or a workflow."""
    commands = re.findall(r"^\s*(?:- run: )?make ([\w-].*)", text, re.MULTILINE)
    return {word for command in commands for word in command.split() if re.fullmatch(r"\w[\w-]*", word)}


def test_workflow_runs_targets_of_the_makefile():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())[1].replace("\\\n", " ").split()
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands and all(re.fullmatch(r"make [\w-]+( [A-Z_]+=\S*)*", command) for command in commands)
    assert all(set(step) & {"run", "uses"} for step in steps) and all("runs-on" in job for job in jobs.values())
    assert make_targets(text) <= set(phony)
    # What CI runs it runs too, but for nvcc and a second Python, of which it has its own.
    ci = make_targets((ROOT / ".ci" / "run").read_text())
    of_ci_alone = {"cuda-build", "emulator", "install", "other-python", "other-torch", "test-other-python"}
    assert ci - make_targets(text) == of_ci_alone
    for name in ("test", "wheels"):
        assert jobs[name]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "refs/tags/" in jobs["wheels"]["if"] and "has not run" in text


def test_citation_and_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["message"] and citation["title"].startswith("ard-kernels") and citation["authors"]
    (paper,) = citation["references"]
    assert paper["type"] and paper["title"] and paper["authors"] and paper["url"].endswith("2504.11295")
    versions = re.findall(r"^## \[(.+)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == ard_kernels.__version__, "the newest version of CHANGELOG.md is another"


@pytest.mark.parametrize(
    ("other", "one", "pythons"),
    [
        ("", "", "python3.11"),
        ("python3.12", "", "python3.11 'python3.12 build/other-torch'"),
        ("python3.12", "1", "'python3.12 build/other-torch'"),
        ("", "1", "python3.11"),
    ],
)
def test_dist_makes_the_wheels_asked_for_and_says_which_is_skipped(other, one, pythons):
    command = ["make", "-n", "dist", "PYTHON=python3.11", f"OTHER_PYTHON={other}", f"ONE={one}"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"printf '%s\\n' +{pythons} +(\\\n +)?\| xargs", planned)
    assert ("SKIPPED wheel for Python 3.12" in planned) is (not other)
