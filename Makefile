# Every target sets up what it needs; a second call repeats nothing. `make help` lists them.

SCALE ?= auto
SEEDS ?= 1,2,3
WORKERS ?= auto
ARGS ?=
# Where runs work: local, ray or slurm, and options of configs/launcher in place of those there.
LAUNCHER ?= local
LAUNCHER_ARGS ?=
# Processes of `make test`; one thread each.
TEST_WORKERS ?= 2
PYTHON3 ?= python3
# Of `make sweep`: a file of configs/sweep, and values of its axes in place of those there.
SWEEP ?= lambda_k
VALUES ?=

ALL_TABLES := $(patsubst configs/table/%.yaml,%,$(sort $(wildcard configs/table/*.yaml)))
# Not of the paper: made by their own target only.
OPTIONAL := $(patsubst configs/table/%.yaml,%,$(shell grep -l '^optional: true' configs/table/*.yaml))
TABLES := $(filter-out $(OPTIONAL),$(ALL_TABLES))
REPRODUCE := $(ALL_TABLES:%=reproduce-%)

# PYTHON= takes an existing environment; without it the targets make their own in .venv.
ifeq ($(strip $(PYTHON)),)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
GPU_READY := $(READY)
# Who has no cluster is spared ray.
ifeq ($(LAUNCHER),ray)
READY := $(VENV)/.ray-ready
endif
else
RUN := $(PYTHON)
READY := check-python
# A GPU machine needs no more than torch, transformers and accelerate for its checks.
GPU_READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# Passed through the environment, so that quotes in them survive.
export ARGS LAUNCHER LAUNCHER_ARGS SCALE SEEDS SWEEP VALUES WORKERS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test faults coverage lint plan dry-run tiny-models reproduce-all $(REPRODUCE) audit sweep report readme bench gpu-check check-results check-pins clean check-python

help:  ## show this list
	@echo "make TARGET [SCALE=auto|tiny|small|paper] [SEEDS=1,2,3] [WORKERS=auto|N] [ARGS='overrides'] [PYTHON=python]"
	@echo "WORKERS=auto uses every GPU and runs several cells on one; for more see scripts/reproduce.py --help"
	@echo "LAUNCHER=ray|slurm [LAUNCHER_ARGS='partition=gpu time=12:00:00'] runs on a cluster: configs/launcher/README.md"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-24s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@for table in $(TABLES) $(OPTIONAL); do \
	  printf '  %-24s %s\n' "reproduce-$$table" "$$(sed -n 's/^title: *//p' configs/table/$$table.yaml)"; done

setup: $(READY)  ## make the environment .venv from requirements.lock (LAUNCHER=ray: with ray)
	@echo "environment: ready ($(RUN))"

test: $(READY)  ## run all tests (ARGS go to pytest)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $$ARGS

faults: $(READY)  ## inject faults and count what becomes of them; all long tests (ARGS go to pytest)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "long or faults" -n $(TEST_WORKERS) --dist load $$ARGS

coverage: $(READY)  ## the same, with the lines that no test runs; slower
	@$(MAKE) --no-print-directory test ARGS="--cov=delta_lora --cov=tasks --cov=scripts --cov-report=term-missing:skip-covered $$ARGS"

lint: $(READY)  ## ruff (lint and format) and mypy
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .
	@$(RUN) -m mypy --no-error-summary
	@echo "lint: nothing found"

WHERE = --workers "$$WORKERS" --launcher "$$LAUNCHER" --launcher-args="$$LAUNCHER_ARGS"
REPRODUCE_ONE = @$(RUN) scripts/reproduce.py $* --scale "$$SCALE" --seeds "$$SEEDS" $(WHERE) --args="$$ARGS"

plan: $(READY)  ## what the tables still need: runs, hours, device memory, disk
	@$(RUN) scripts/reproduce.py $(TABLES) --plan --scale "$$SCALE" --seeds "$$SEEDS" $(WHERE) --args="$$ARGS"

dry-run: $(READY)  ## is the plan right? every row of Tables 1 to 4 at full size, 3 steps on a CPU (hours)
	@$(RUN) scripts/dry_run.py $$ARGS

tiny-models: $(READY)  ## pre-train the tiny models that scale tiny starts from
	@$(RUN) scripts/reproduce.py $(TABLES) --prepare --scale tiny --workers 1

reproduce-all: $(READY)  ## all tables and figures of the paper, and one page with all of them: results/SCALE/README.md
	@$(RUN) scripts/reproduce.py $(TABLES) --scale "$$SCALE" --seeds "$$SEEDS" $(WHERE) --args="$$ARGS"

# The second rule takes names that are no table; the script says which there are.
$(REPRODUCE): reproduce-%: $(READY)
	$(REPRODUCE_ONE)
reproduce-%: $(READY)
	$(REPRODUCE_ONE)

audit: $(READY)  ## what the paper leaves open, measured: results/SCALE/audit.md
	@$(RUN) scripts/audit.py --scale "$$SCALE" --seeds "$$SEEDS" $(WHERE) --args="$$ARGS"

sweep: $(READY)  ## a grid of settings: results/SCALE/sweeps/SWEEP (SWEEP=lambda_k, VALUES='lambda=0.5,1,2 K=0,4')
	@$(RUN) scripts/sweep.py "$$SWEEP" --scale "$$SCALE" --seeds "$$SEEDS" $(WHERE) --values "$$VALUES" --args="$$ARGS"

report: $(READY)  ## all results of a scale as one page that opens from disk: results/SCALE/report/index.html
	@$(RUN) scripts/report.py --scale "$$SCALE"

readme: $(READY)  ## put the generated rows into README
	@$(RUN) scripts/readme.py

.PHONY: dashboard
dashboard: $(READY)  ## bring the runs to Weights & Biases from their folders, with a view and a report of every table and sweep
	@scale=$$($(RUN) scripts/runs/scale.py "$$SCALE") && \
	$(RUN) scripts/dashboard.py sync $$ARGS && $(RUN) scripts/dashboard.py summary --scale $$scale $$ARGS && \
	$(RUN) scripts/dashboard.py all --scale $$scale $$ARGS

gpu-check: $(GPU_READY)  ## what only a GPU can show, nine minutes at most: results/gpu/DEVICE.json (ONLY=2,7)
	@$(RUN) scripts/gpu_check.py $$ARGS

bench: $(READY)  ## seconds and memory of data at full size, of rows made on the spot (many minutes)
	@$(RUN) benchmarks/data_at_scale.py $$ARGS

check-results: $(READY)  ## do the committed tables, sweeps and report follow, byte for byte, from the committed records?
	@$(RUN) scripts/tables.py --scale tiny --check
	@$(RUN) scripts/audit.py --scale tiny --check
	@for name in $(notdir $(wildcard results/tiny/sweeps/*)); do \
	  $(RUN) scripts/sweep.py "$$name" --scale tiny --check || exit 1; done
	@$(RUN) scripts/report.py --scale tiny --check

check-pins: $(READY)  ## are all pinned weights and data where they are downloaded from? needs the network
	@$(RUN) scripts/check_pins.py $$ARGS

clean:  ## remove caches; .venv, runs (outputs/) and results/ stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

LOG := .venv/setup.log
INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --no-input
# pip says a thousand lines: they go into the log, and its end is shown where it fails.
INTO_LOG = >> $(LOG) 2>&1 || { tail -n 8 $(LOG) >&2; \
  echo "error: installing failed, see above and $(LOG). Without a network: set PIP_INDEX_URL to a mirror, or take" \
  "an environment that has the packages of requirements.lock: make PYTHON=/path/to/python. Then give the same command again" >&2; \
  exit 1; }

SUITABLE := import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

.venv/.ready: requirements.lock pyproject.toml
	@command -v "$(PYTHON3)" >/dev/null || { \
	  echo "error: no '$(PYTHON3)' found; install Python 3.10 to 3.13, or name one: make PYTHON3=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON3)" -c '$(SUITABLE)' || { \
	  echo "error: $$($(PYTHON3) --version) does not fit; use Python 3.10 to 3.13: make PYTHON3=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON3)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON3) has no venv module; install it (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	@echo "environment: creating .venv with $$($(PYTHON3) --version)"
	@"$(PYTHON3)" -m venv .venv && : > $(LOG)
	@echo "environment: installing $$(grep -c == requirements.lock) packages, some minutes (log: $(LOG))"
	@$(INSTALL) -r requirements.lock $(INTO_LOG)
	@echo "environment: adding delta_lora itself"
	@$(INSTALL) --no-deps -e . $(INTO_LOG)
	@touch $@

.venv/.ray-ready: requirements-ray.lock .venv/.ready
	@echo "environment: adding ray (log: $(LOG))"
	@$(INSTALL) --no-deps -r requirements-ray.lock $(INTO_LOG)
	@touch $@

# What an environment given by PYTHON= must have.
NEEDED := accelerate datasets evaluate hydra matplotlib nltk numpy pooch pyarrow pycocoevalcap rouge_score sacrebleu \
  safetensors scipy sklearn torch tqdm transformers wandb

check-python:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: PYTHON=$(PYTHON) is not found" >&2; exit 1; }
	@"$(PYTHON)" -c '$(SUITABLE)' || { echo "error: $$($(PYTHON) --version) does not fit; use Python 3.10 to 3.13" >&2; exit 1; }
	@"$(PYTHON)" -c 'import importlib.util as u, sys; lacking = [m for m in sys.argv[1:] if u.find_spec(m) is None]; \
	  sys.exit(f"error: PYTHON=$(PYTHON) lacks {lacking}; install requirements.lock there" if lacking else 0)' $(NEEDED)
