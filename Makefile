# Train and sample a class-conditional diffusion model. `make` alone prints help.
#
# Without PYTHON= targets that need packages prepare .venv first; with it that interpreter is used as
# it is.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# The variables of each target; those of the machine may stand beside any of them.
MACHINE := PYTHON BASE_PYTHON DATA_DIR
PROCESSES := GPUS NODES NODE_RANK RENDEZVOUS RESTARTS
TRAINING := DATASET EPOCHS BATCH_SIZE SAMPLES SEED DEVICE
DRAWING := SAMPLES SAMPLER STEPS GUIDANCE SEED BATCH_SIZE OUTPUT DEVICE
SCORING := DATASET PICTURES SWEEP
$(foreach goal,demo train overfit test quick-test,$(eval of_$(goal) := $(TRAINING) FRESH ARGS $(PROCESSES)))
of_generate := $(DRAWING) CHECKPOINT CLASSES GRID TRAJECTORY ARGS $(PROCESSES)
of_evaluate := $(DRAWING) CHECKPOINT $(SCORING) ARGS $(PROCESSES)
of_report := RUN ARGS
of_doctor := DATASET DEVICE ARGS
of_bench := BATCH_SIZE DEVICE ARGS
$(foreach goal,data status monitor gpu-status check,$(eval of_$(goal) := ARGS))
$(foreach goal,clean clean-all clean-cuda,$(eval of_$(goal) := CONFIRM))
$(foreach goal,help install,$(eval of_$(goal) :=))
goals := $(or $(MAKECMDGOALS),help)
given := $(foreach name,$(.VARIABLES),$(if \
  $(and $(findstring command line,$(origin $(name))),$(value $(name))),$(name)))
unused := $(firstword $(filter-out $(MACHINE) $(foreach goal,$(goals),$(of_$(goal))),$(given)))
# Of a target that does not exist make itself says so.
mistyped := $(foreach goal,$(goals),$(filter undefined,$(origin of_$(goal))))
ifneq ($(if $(mistyped),,$(unused)),)
  $(error `make $(goals)` has no variable $(unused), but: $(sort $(MACHINE) \
    $(foreach goal,$(goals),$(of_$(goal)))); `make help` says more)
endif
$(foreach name,FRESH GRID TRAJECTORY CONFIRM,$(if $(filter-out 1 yes true 0 no false,$($(name))),\
  $(error $(name)=$($(name)) is neither 1 nor 0)))

ifdef PYTHON
  BASE_PYTHON ?= $(PYTHON)
  ENVIRONMENT := check-python
  EVALUATION_ENVIRONMENT := check-python
  TEST_ENVIRONMENT := check-python
else  # or empty
  override PYTHON := .venv/bin/python
  ENVIRONMENT := .venv/.installed
  EVALUATION_ENVIRONMENT := .venv/.installed-eval
  TEST_ENVIRONMENT := .venv/.installed-dev
  # In the order of the names, at whose end short files fill the gap behind the longest.
  TEST_FLAGS := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
endif
# The interpreter that creates .venv and runs what needs no packages.
BASE_PYTHON ?= $(or $(shell test -e .venv/.installed -a -x .venv/bin/python && echo .venv/bin/python),python3)

# Some clusters set it for purposes of their own.
ifneq ($(origin NODE_RANK),command line)
  NODE_RANK :=
endif

# Variables become flags of their names; a value may hold spaces. ARGS= hands on anything else.
argument = $(if $(value $(1)),'$(subst ','\'',$(value $(1)))')
flag = $(if $(value $(1)),--$(shell tr A-Z_ a-z- <<< $(1))=$(call argument,$(1)))
flags = $(foreach name,$(1),$(call flag,$(name)))
switch = $(if $(filter 1 yes true,$($(1))),$(2))
LAUNCH = '$(PYTHON)' $(if $(strip $(foreach name,$(PROCESSES),$(value $(name)))),\
  launch.py$(if $(GPUS)$(NODES),, --gpus 1) $(call flags,$(PROCESSES)))
TRAIN_FLAGS = $(call flags,DATA_DIR $(TRAINING)) $(call switch,FRESH,--fresh) $(ARGS)
GENERATE_FLAGS = $(call argument,CHECKPOINT) $(call flags,$(DRAWING) CLASSES) \
  $(call switch,GRID,--grid-only) $(call switch,TRAJECTORY,--trajectory) $(ARGS)
EVALUATE_FLAGS = $(call argument,CHECKPOINT) $(call flags,DATA_DIR $(DRAWING) $(SCORING)) $(ARGS)
CLEAN_FLAGS = $(call switch,CONFIRM,--yes)
REQUIRE_BASE = '$(BASE_PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
  echo "error: $(BASE_PYTHON) is missing or older than 3.11; name another:" \
    "$(if $(filter $(BASE_PYTHON),$(PYTHON)),PYTHON,BASE_PYTHON)=python3.12" >&2; exit 1; }

PIP_INSTALL = .venv/bin/python -m pip install -q --disable-pip-version-check -r
# One make installs at a time; what another has installed meanwhile is not installed again.
ALONE = { exec 9>> requirements.txt; } 2> /dev/null; flock -n 9 2> /dev/null; \
  test $$? != 1 || { echo "waiting for another make, which is installing"; flock 9; }
INSTALLED = test -e $@ && test -z "$$(find $^ -newer $@)"

.PHONY: help install demo data train overfit test quick-test report generate evaluate status monitor \
  doctor gpu-status bench check clean clean-all clean-cuda check-python

help:  ## This list
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14 | sed 's/^/  /'
	@echo
	@echo "variables: DATA_DIR DATASET EPOCHS BATCH_SIZE SAMPLES SEED CLASSES SAMPLER STEPS GUIDANCE"
	@echo "           OUTPUT GRID=1 (no single pictures) TRAJECTORY=1 (noise to picture, animated)"
	@echo "           PICTURES=folder SWEEP=1,2,3 (of evaluate) RUN=folder (of report)"
	@echo "           GPUS NODES NODE_RANK RENDEZVOUS RESTARTS (several GPUs or machines)"
	@echo "           CHECKPOINT DEVICE FRESH=1 CONFIRM=yes PYTHON (use this interpreter as it is)"
	@echo "           ARGS='--train.learning_rate 3e-4' (any setting; make train ARGS=--help)"

install: $(ENVIRONMENT)  ## Create .venv and install requirements.txt; repeated: nothing to do
	@echo "ready: $(PYTHON)"

demo: $(ENVIRONMENT)  ## The whole product on a laptop CPU: train small, draw a grid
	@$(LAUNCH) train_model.py --demo $(TRAIN_FLAGS)
	@'$(PYTHON)' generate_samples.py checkpoints_demo --samples 4 --output generated_images/demo \
	  $(call flag,DEVICE)
	@echo "next: 'make overfit' checks the full model, 'make train' trains it, 'make help' lists more"

data: $(ENVIRONMENT)  ## Find or download CIFAR-10 and prepare it
	@'$(PYTHON)' prepare_data.py $(call flag,DATA_DIR) $(ARGS)

train: $(ENVIRONMENT)  ## Full training; continues the run that is there
	@$(LAUNCH) train_model.py --full $(TRAIN_FLAGS)

overfit: $(ENVIRONMENT)  ## Memorise SAMPLES images per class (1), with a pass/fail verdict
	@$(LAUNCH) train_model.py --overfit $(TRAIN_FLAGS)

test: overfit  ## The same as overfit (the test suite is: make check)

quick-test: $(ENVIRONMENT)  ## Two epochs of overfit: a smoke run of everything
	@$(LAUNCH) train_model.py --quick-test $(TRAIN_FLAGS)

report: $(ENVIRONMENT)  ## One page with everything about the newest run, or the run in RUN=folder
	@'$(PYTHON)' report.py $(call argument,RUN) $(ARGS)

generate: $(ENVIRONMENT)  ## Pictures and a labelled grid from the newest usable checkpoint
	@$(LAUNCH) generate_samples.py $(GENERATE_FLAGS)

evaluate: $(EVALUATION_ENVIRONMENT)  ## Scores of a checkpoint's samples, or of PICTURES=folder
	@$(LAUNCH) evaluate_samples.py $(EVALUATE_FLAGS)

status:  ## Training state and the checkpoints that exist
	@$(REQUIRE_BASE)
	@'$(BASE_PYTHON)' run_status.py status $(ARGS)

monitor:  ## Live view of the run and the GPU
	@$(REQUIRE_BASE)
	@'$(BASE_PYTHON)' run_status.py monitor $(ARGS)

doctor: $(ENVIRONMENT)  ## Whether training will work here: everything it needs, tried in small
	@'$(PYTHON)' doctor.py $(call flags,DATA_DIR DATASET DEVICE) $(ARGS)

gpu-status: $(ENVIRONMENT)  ## GPU, driver, CUDA and PyTorch, with the cure where something is wrong
	@'$(PYTHON)' gpu_status.py $(ARGS)

bench: $(ENVIRONMENT)  ## Speed and memory of training and sampling on this machine
	@'$(PYTHON)' benchmark.py $(call flags,BATCH_SIZE DEVICE) $(ARGS)

check: $(TEST_ENVIRONMENT)  ## The test suite
	@'$(PYTHON)' -m pytest -q tests $(TEST_FLAGS) $(ARGS)

clean:  ## Remove runs and pictures; asks (or CONFIRM=yes) if a full run's checkpoints are there
	@$(REQUIRE_BASE)
	@'$(BASE_PYTHON)' clean.py runs $(CLEAN_FLAGS)

clean-all:  ## The same, prepared data, caches and .venv
	@$(REQUIRE_BASE)
	@'$(BASE_PYTHON)' clean.py all $(CLEAN_FLAGS)

clean-cuda:  ## Show who holds GPU memory; after asking end our own leftovers, clear GPU caches
	@$(REQUIRE_BASE)
	@'$(BASE_PYTHON)' clean.py cuda $(CLEAN_FLAGS)

.venv/bin/python:
	@$(REQUIRE_BASE)
	@$(ALONE); test -x $@ && exit; \
	  test ! -L $@ || { echo "error: $@ links to a Python that is gone; rm -rf .venv, and the" \
	    "next make sets it up anew" >&2; exit 1; }; \
	  echo "creating .venv with $(BASE_PYTHON)"; '$(BASE_PYTHON)' -m venv .venv || { rm -rf .venv; \
	  echo "error: cannot create .venv (reason above); on Debian or Ubuntu it needs: apt install python3-venv" >&2; exit 1; }

.venv/.installed: requirements.txt | .venv/bin/python
	@$(ALONE); $(INSTALLED) && exit; \
	  echo "installing $< into .venv (PyTorch is large: minutes)"; $(PIP_INSTALL) $< && touch $@ || { \
	  echo "error: the installation failed; try again after rm -rf .venv, or use packages of your own: PYTHON=python3" >&2; exit 1; }

# Without the network the scores that need no more than the run-time packages remain.
.venv/.installed-eval: requirements-eval.txt .venv/.installed
	@$(ALONE); $(INSTALLED) && exit; $(PIP_INSTALL) $< && touch $@ \
	  || echo "$< could not be installed: no FID this time" >&2

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	@$(ALONE); $(INSTALLED) && exit; $(PIP_INSTALL) $< && touch $@

check-python:
	@command -v '$(PYTHON)' > /dev/null || { echo "error: PYTHON=$(PYTHON) is no program here; name \
	an interpreter, or leave PYTHON= out" >&2; exit 1; }
	@$(REQUIRE_BASE)
	@'$(PYTHON)' -c 'import importlib.util as u, sys; m = [p for p in \
	  ("torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL") if not u.find_spec(p)]; \
	  sys.exit("error: $(PYTHON) lacks " + ", ".join(m) + "; install requirements.txt there or leave PYTHON= out" if m else 0)'
