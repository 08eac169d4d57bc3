# demo and test work on a fresh machine with Python 3.11 and make; everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SOURCES := $(shell find cluster pipeline training -type f -not -name '*.pyc')
DEMO_OUT ?= demo-out
FAULTS_OUT ?= faults-out

.PHONY: help demo test test-all check faults bench-fetch bench-methods bench-loss bench-robustness bench-rules bench-dedup bench-durable clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed  ## the main job on the corpus that ships here: build, train CLIP and RILS, evaluate, report
	$(BIN)/python tests/corpus/demo.py --output $(DEMO_OUT)

test: check  ## every check and test
	$(BIN)/pytest

test-all: check  ## the same, with the tests that go through every combination
	$(BIN)/pytest -m ""

check: .venv/.installed  ## lint, formatting, types, import directions, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell cluster pipeline training tests docs README.md CHANGELOG.md Makefile pyproject.toml

faults: .venv/.installed  ## kill, cut off and fill up everything while it works: nothing lost, doubled or different; 20 minutes
	$(BIN)/python tests/faults/run.py --output $(FAULTS_OUT)

bench-fetch: .venv/.installed  ## the fetch stage against img2dataset 1.47.0, in turns; needs ten minutes on two cores
	$(BIN)/python tests/benchmarks/fetch.py

bench-methods: .venv/.installed  ## time and memory of a step of every method, against CLIP; two minutes on an idle core
	$(BIN)/python tests/benchmarks/methods.py

bench-politeness: .venv/.installed  ## what limits per host over the cluster cost; half a minute
	$(BIN)/python tests/benchmarks/politeness.py

bench-loss: .venv/.installed  ## memory and time of the contrastive losses against dense ones; needs 15 GiB free and minutes
	$(BIN)/python tests/benchmarks/loss.py

bench-rules: .venv/.installed  ## captions a second through every rule that needs no image; a minute
	$(BIN)/python tests/benchmarks/rules.py

bench-dedup: .venv/.installed  ## exact and near-duplicates at scale, against Ray Data; ten minutes on two idle cores, 12 GB of disk
	$(BIN)/python tests/benchmarks/dedup.py

bench-durable: .venv/.installed  ## a build to a real S3 server against the same to a local disk, in turns; two minutes on two idle cores
	$(BIN)/python tests/benchmarks/durable.py

bench-robustness: .venv/.installed  ## changed copies found by perceptual hash and embedding; PHOTOS=FOLDER for photographs; minutes
	$(BIN)/pip install -q -c constraints.txt '.[bench]'
	$(BIN)/python tests/benchmarks/robustness.py --table $(if $(PHOTOS),--photos $(PHOTOS))
	$(BIN)/python tests/benchmarks/hash_variants.py $(if $(PHOTOS),--photos $(PHOTOS))

clean:  ## remove the virtual environment and the outputs of demo and faults
	rm -rf .venv build *.egg-info $(DEMO_OUT) $(FAULTS_OUT)

.venv/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pairmill needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	rm -rf build *.egg-info
	$(BIN)/pip install -q -c constraints.txt '.[test]'
	touch $@

# The package itself is installed anew when a source file changes: tests and demo run what users install.
.venv/.installed: .venv/.dependencies $(SOURCES)
	rm -rf build *.egg-info
	$(BIN)/pip install -q --no-deps --force-reinstall .
	touch $@
