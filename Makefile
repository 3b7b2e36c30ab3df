# `make reproduce` and `make test` are all that a fresh machine needs: Python 3.11, git and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
export PYTHONHASHSEED = 0
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install reproduce paper peers seeds difference test test-scale storm fuzz benchmark kernels gpu-kernels scale lint compare clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# What is never imported need not be compiled: 66 s in place of 100.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[pipeline,remote,export,ray,dev]'
	touch $@

install: $(READY)  ## the pinned environment in .venv

reproduce: $(READY)  ## run the pipeline on the embedded model, print the table
	@python tools/mend.py
	dvc repro
	@python tools/show.py

paper: $(READY)  ## the paper's models and OPT-1.3B on WikiText-2, from the hub, in a throw-away workspace
	tools/paper.sh

peers: $(READY)  ## other people's tools on the embedded model, in .venv-peers, beside ours; hours on 2 cores
	PYTHON=$(PYTHON) tools/peers.sh

seeds: $(READY)  ## three calibration seeds of three methods, into metrics/seeds; 17 minutes on 2 busy cores
	python tools/seeds.py

difference: $(READY)  ## what this commit does to main's figures (BASE=... another's), as Markdown and plots in difference/
	tools/difference.sh $(BASE)

test: $(READY)  ## the offline test suite, with lint and types
	ruff check . && ruff format --check . && mypy
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-scale: $(READY)  ## true shapes of large models: minutes and gigabytes
	python -m pytest -m scale

storm: $(READY)  ## a hundred killed runs, each of which must go on to the same files
	python -m pytest -m storm -n 2

fuzz: $(READY)  ## hundreds of thousands of damaged packed directories, none of which may pass
	python -m pytest -m fuzz -n 2

benchmark: $(READY)  ## time and memory of score, allocate and pack on GPT-2's true shapes
	python tools/benchmark.py

kernels: $(READY)  ## products with packed matrices against torch's and ONNX Runtime's, on GPT-2 XL's and Llama-7B's shapes
	python tools/kernels.py

gpu-kernels: $(READY)  ## the same on a GPU, against cuBLAS; needs Triton (pip install -e '.[gpu]')
	python tools/gpu_kernels.py

scale: $(READY)  ## what larger models and more machines would take (docs/scale.md); an hour on a quiet machine
	OPENBLAS_NUM_THREADS=1 python tools/scale.py record
	python tools/scale.py workers
	python tools/scale.py predict

lint: $(READY)  ## format and check
	ruff check --fix . && ruff format . && mypy

compare: $(READY)  ## hold a fresh run's metrics against the committed ones
	@python tools/compare.py

clean:  ## remove what was made, keep the environment
	rm -rf difference dvc_plots data/allocations data/baselines data/downloads data/evaluations data/imports data/methods data/packed data/peers data/scores data/times report .dvc/cache .dvc/tmp
