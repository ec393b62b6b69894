# Every target sets up .venv from constraints.txt when it is needed; a machine needs Python, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPP := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test test-slow test-sanitize lint format bench aot aot-update gpu-check gpu-bench clean

install: $(STAMP)

# torch first and exactly pinned: a range would bring another build. Python code is used in place (-e).
$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CPP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[train,test,bench,dev]'
	touch $(STAMP)

demo: install
	$(BIN)/ard demo --out runs/demo

test: install
	$(BIN)/pytest -m 'not slow'

test-slow: install
	$(BIN)/pytest -m slow

# The C++ kernels once more under AddressSanitizer and UndefinedBehaviorSanitizer: the tests that reach them.
SANITIZED := $(CURDIR)/build/sanitized
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
test-sanitize: install
	rm -rf $(SANITIZED)
	ARD_SANITIZE=1 $(BIN)/pip install --quiet --no-deps --target $(SANITIZED) .
	LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 PYTHONPATH=$(SANITIZED) \
	  ARD_EXPECT_EXTENSION=$(SANITIZED) $(BIN)/pytest tests/segment_adaln tests/history -k 'not compile and not triton'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: install
	$(BIN)/python -m benchmarks

# Every Triton kernel and shipped configuration compiled for sm_80, sm_90 and sm_100, checked, compared with the tables.
aot: install
	$(BIN)/python -m benchmarks.aot

aot-update: install
	$(BIN)/python -m benchmarks.aot --update

# For a machine with an NVIDIA GPU: nothing is installed, what its Python has is used. GPU_MINUTES (default 10) bounds it.
gpu-check:
	$(PYTHON) -m benchmarks.gpu

gpu-bench:
	$(PYTHON) -m benchmarks.gpu --only benchmark

clean:
	rm -rf $(VENV) build dist *.egg-info ard_kernels/_C*.so
