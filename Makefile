# The daily commands by name. Everything runs in .venv, which `make` creates with the pinned packages.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# Of `make demo`. SEED (of phantom and training) and DEMO_FLAGS may be given:
#   make demo SEED=1 DEMO_FLAGS="--max_iterations 20"
SEED ?= 1337
DEMO_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo hippocampus check test test-all format

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(READY): requirements.txt requirements-extra.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extra.txt -c constraints.txt
	@touch $@

demo: $(READY) ## train and test DTML and a V-Net on phantom scans, in minutes, without data or GPU
	$(RUN) code/make_phantom.py --seed $(SEED) --test 12 --overwrite
	$(RUN) code/train.py --method supervised --preset demo --seed $(SEED) --exp demo_vnet --overwrite $(DEMO_FLAGS)
	$(RUN) code/train_dtml.py --preset demo --seed $(SEED) --exp demo_dtml --overwrite $(DEMO_FLAGS)
	$(RUN) code/test_LA.py --exp demo_vnet demo_dtml --report

hippocampus: $(READY) ## the same on real scans: make hippocampus DATA=Task04_Hippocampus (docs/hippocampus.md)
	@test -d "$(DATA)/imagesTr" || { echo 'DATA must be the folder Task04_Hippocampus of the Decathlon; see docs/hippocampus.md'; exit 2; }
	@test "$(DATA)" -ef data/hippocampus/Task04_Hippocampus || ln -sfn "$(abspath $(DATA))" data/hippocampus/Task04_Hippocampus
	$(RUN) code/prepare_scans.py --images data/hippocampus/scans.csv --dest data/hippocampus
	$(RUN) code/train.py --method supervised --preset hippocampus --labelnum 4 --exp hippocampus_vnet --overwrite $(DEMO_FLAGS)
	$(RUN) code/train_dtml.py --preset hippocampus --labelnum 4 --exp hippocampus_dtml --overwrite $(DEMO_FLAGS)
	$(RUN) code/test_LA.py --exp hippocampus_vnet hippocampus_dtml --report

check: $(READY) ## before each commit: lint and the fast tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest -n auto

test: $(READY) ## the fast tests (2 minutes on two cores; no GPU, no data)
	$(RUN) -m pytest -n auto

test-all: $(READY) ## every test, the slow ones and those on real scans included
	$(RUN) -m pytest -n auto -m ""

format: $(READY) ## let ruff lay out the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
