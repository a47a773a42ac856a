# `make help` lists the targets. Every target that runs Python first makes sure that .venv is complete.
PYTHON ?= python3
BIN := .venv/bin
BUNDLES ?= tests/data/bundles/*
# Of another machine: a Python that has the packages but not codetr.
GPU_PYTHON ?= $(BIN)/python
# Cached byte code makes every later start ten seconds faster.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help install demo demo-shapes serve studies compare-heads compare-kinds compare-parts compare-groups compare-mixtures figures parity test test-all check format modes accumulation chaos soak bench gpu tune links measure export-matrix readme wheel lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[36m%-14s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.complete ## Create .venv with the locked packages and codetr itself (once)

.venv/.complete: pyproject.toml requirements.lock requirements.demo setup.py $(wildcard kernels/*/__init__.py)
	@echo "Setting up .venv with the locked packages (about a minute, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet "uv>=0.8"
	@$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps -r requirements.demo -e .
	@touch $@

demo: install ## Train a Co-DETR (K = 2) on photographs of trees: mAP, pictures, curves in outputs/trees/<date>
	$(BIN)/python -m codetr.train experiment=trees

demo-shapes: install ## The same from random weights on the embedded, drawn data set, in outputs/demo/<date>
	$(BIN)/python -m codetr.train experiment=demo

serve: install ## The detector of the newest `make demo` behind HTTP, with a page for browsers: ARGS="port=8080"
	@newest=$$(ls -t outputs/trees/*/checkpoints/best.ckpt 2>/dev/null | head -n 1); \
	test -n "$$newest" || { echo "error: there is no outputs/trees/*/checkpoints/best.ckpt; make demo leaves one"; exit 2; }; \
	exec $(BIN)/python -m codetr.serve checkpoint=$$newest $(ARGS)

studies: compare-heads compare-kinds compare-parts compare-groups compare-mixtures ## All studies below (hours): the tables of docs/results.md

compare-heads: ## Co-DETR, same budget: 0, 1, 2 auxiliary heads, three seeds
compare-kinds: ## Co-DETR, table 8: each of the seven heads alone, against none
compare-parts: ## Co-DETR, table 9: auxiliary head, positive queries, both
compare-groups: ## Group DETR: 1, 3, 11 groups and naive one-to-many assignment
compare-mixtures: ## What no paper has: heads, groups, hybrid and denoising queries, alone and in pairs

compare-heads compare-kinds compare-parts compare-groups compare-mixtures: install
	$(BIN)/python -m benchmarks training/compare $(@:compare-%=%)

STUDY ?= heads
figures: install ## The papers' figures, from the checkpoints of a study: STUDY=groups (docs/analyses.md)
	$(BIN)/python -m benchmarks analyses/figures --study $(STUDY)

parity: install ## Our models against the official code's recorded tensors, a line per stage: BUNDLES="dir ..."
	$(BIN)/python tests/parity/check.py $(BUNDLES)

test: install ## Everything that runs in minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not cuda"

test-all: install ## The slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not cuda" --cov --cov-report=term:skip-covered

check: install ## Lint, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

modes: install ## All modes of training, beside float32 on one process: docs/modes.md
	$(BIN)/python tests/integration/modes.py

accumulation: install ## Gradients of accumulated batches beside those of one batch: the table of docs/clusters.md
	$(BIN)/python tests/integration/accumulation.py

KILLS ?= 50
chaos: install ## Kill, starve, poison and restart toy runs: KILLS=50; what is lost, in benchmarks/results/chaos.md
	PYTHONPATH=tests $(BIN)/python -m chaos --kills $(KILLS)

soak: install ## 5,000 toy steps: memory, descriptors and threads stay flat; benchmarks/results/soak.png
	PYTHONPATH=tests $(BIN)/python -m chaos.soak

bench: install ## CPU benchmarks, results in benchmarks/results; one of `python -m benchmarks`: NAME="training/matcher --repeat 5"
ifdef NAME
	$(BIN)/python -m benchmarks $(NAME)
else
	$(BIN)/python -m benchmarks attention/cpu
	$(BIN)/python -m benchmarks training/matcher
	$(BIN)/python -m benchmarks heads/roi_align
	$(BIN)/python -m benchmarks data/loader
	$(BIN)/python -m benchmarks training/step_cost groups
	$(BIN)/python -m benchmarks training/step_cost groups --size 800 1333 --cases "K = 1" "K = 11"
	$(BIN)/python -m benchmarks training/step_cost heads
	$(BIN)/python -m benchmarks training/memory
	$(BIN)/python -m benchmarks training/rivals
	$(BIN)/python -m codetr.benchmark step experiment=demo size=[128,128] batch=8 objects=6 repeats=15 out=benchmarks/results/step_demo
	$(BIN)/python -m codetr.benchmark step model=co_deformable repeats=5 out=benchmarks/results/step_co_deformable
	$(BIN)/python -m benchmarks inference/latency
endif

# Beside a Python that is not ours codetr lies as links, laid out as an installation would.
ifneq ($(GPU_PYTHON),$(BIN)/python)
gpu tune: export PYTHONPATH := $(CURDIR)/build/site:$(PYTHONPATH)
gpu tune: links
else
gpu tune: install
endif

GPU_STEP ?= experiment=official/co_dino_5scale_r50_1x_coco size=[800,1333] batch=2 objects=20 repeats=20

links:
	rm -rf build/site && mkdir -p build/site/codetr/kernels
	ln -s $(filter-out %/kernels %/__pycache__,$(wildcard $(CURDIR)/src/codetr/*)) $(CURDIR)/conf build/site/codetr
	ln -s $(CURDIR)/src/codetr/kernels/__init__.py $(CURDIR)/kernels/* build/site/codetr/kernels

gpu: ## On a CUDA machine: kernel tests, benchmarks, 200 steps (GPU_PYTHON=python3, CLASSIC=.../models/ops/src)
	$(GPU_PYTHON) -m pytest -W default tests/kernels
	$(GPU_PYTHON) -m benchmarks attention/gpu $(if $(CLASSIC),--classic $(CLASSIC))
	$(GPU_PYTHON) -m codetr.benchmark step $(GPU_STEP) trainer=gpu against=[reference] out=benchmarks/results/gpu_step
	$(GPU_PYTHON) -m codetr.train experiment=demo trainer=gpu trainer.max_steps=200 name=gpu

tune: ## On a CUDA machine: the fastest launch constants into kernels/msda/launch.json
	$(GPU_PYTHON) -m benchmarks attention/tune

export-matrix: install ## Every detector in every exported format beside PyTorch: ARGS="--full" for full widths; goes on if stopped
	$(BIN)/python -m benchmarks export/matrix $(ARGS)

measure: install ## `make demo-shapes` from a fresh clone, twice: time, mAP, the same digits
	$(BIN)/python -m benchmarks training/demo --repeat 2

readme: install ## Put the measured tables into README and docs, and write docs/reproduction.md
	$(BIN)/python -m benchmarks.readme

wheel: install ## Build the sdist and the wheel in dist/
	rm -rf build dist
	$(BIN)/python -m build --installer uv --outdir dist

lock: ## Resolve pyproject.toml into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --no-header --no-annotate --no-emit-index-url --output-file requirements.lock

clean: ## Remove what was built, not what was trained
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache htmlcov .coverage*
