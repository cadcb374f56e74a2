# make book        execute the notebooks and build the book: _build/html/index.html
# make pdf         print the book: _build/why-networks-forget.pdf (needs Chromium)
# make test        every test: library, notebooks, the book in a browser
# make notebooks   store fresh outputs in the notebooks
# make bench       the methods' speed beside a bare PyTorch loop and peers
# make mutants     small bugs put into methods, replay and curvature: does a test notice? (ARGS="--count 50"; long)
# make faults      kills, full disks, flipped bits, input that nobody meant: an hour (ARGS="--minutes 5"; a report for the book)
# make kills       a hundred kills of runs on all backends (ARGS="--engines dask ray"; needs what they need)
# make lint        ruff: names, imports, form (a part of make test; make format mends what it can)
# make clean       remove what was built (make distclean: the environment too)

.DEFAULT_GOAL := book
.PHONY: book pdf test notebooks bench mutants faults kills lint format clean distclean environment

# The first of these that is Python 3.11 or later; `make PYTHON=… book` names another.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.13 python,$(shell \
	$(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
BIN := $(CURDIR)/.venv/bin

# The stamp's name holds what the environment was made from and where, so that a changed requirement, an interrupted
# installation and a moved checkout all give a new one. Of pyproject.toml that is what comes before the tools' settings.
PINS := requirements.txt requirements-dev.txt constraints.txt
STAMP := .venv/.made-$(shell { pwd; cat $(PINS); sed '/^\[tool\./,$$d' pyproject.toml; } | cksum | tr ' ' '-')

# One thread each: tests and notebooks run beside each other on the cores.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1

environment: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it, or name it with make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making the environment in .venv (some minutes, once)"
	@$(PYTHON) -m venv --clear .venv || { echo "Could not make .venv with $(PYTHON): install its venv module (Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

book: $(STAMP)
	@$(BIN)/python book/build.py

pdf: $(STAMP)
	@$(BIN)/python book/pdf.py

notebooks: $(STAMP)
	@$(BIN)/python book/build.py --refresh

test: lint
	@$(BIN)/python -m pytest -q -n auto --dist loadgroup $(ARGS)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile --nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout=300 notebooks

bench: $(STAMP)
	@$(BIN)/python benchmarks/bench.py $(ARGS)

mutants: $(STAMP)
	@$(BIN)/python tests/mutants.py $(ARGS)

faults: $(STAMP)
	@$(BIN)/python tests/faults.py --out data/results/faults.json $(ARGS)

kills: $(STAMP)
	@$(BIN)/python tests/kills.py --out data/results/kills.json $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted; make format mends it"; exit 1; }

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv
