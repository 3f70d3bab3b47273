# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test chaos fuzz lint types

demo: $(STAMP)
	$(BIN)/glscl demo

# Two files at a time: most tests wait for servers and clusters to start. One thread each, or they only contend.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The kill matrix in its long form: every fault so many times, at other moments each time; its table in chaos.md.
ROUNDS ?= 5
SEED ?= 0
chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/chaos --chaos-rounds $(ROUNDS) --chaos-seed $(SEED) \
		--chaos-table chaos.md $(PYTEST_ARGS)

# The long form of the fuzz tests: other inputs each round, MINUTES in all. What fails is kept in tests/fuzz/found.
MINUTES ?= 60
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -rA --fuzz-minutes $(MINUTES) --fuzz-seed $(SEED) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# The stamp is written last: an interrupted installation is not taken for a whole one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)
