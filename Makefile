# taskd: `make run` serves, `make test` runs every check. Both start from a fresh clone and need
# only Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

# Python and pytest keep compiled files, even if the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run demo check test test-quick test-sqlite test-postgresql coverage lint openapi \
    statements lock fuzz mutants audit bench clean

run: .venv/run
	@$(BIN)/python taskctl.py init
	@exec $(BIN)/python taskd.py

check: .venv/test
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint test-quick

# Better Auth, a page and taskd together. Only this needs Node.
demo: examples/better-auth/node_modules/.installed .venv/run
	@PYTHON=$(CURDIR)/$(BIN)/python exec node examples/better-auth/demo.mjs

# All at once: many tests wait, and leave the processors to the others. Five processes keep two
# processors busy; more would start more browsers and servers that are made once in each.
test: .venv/test
	@$(MAKE) --no-print-directory --jobs 3 lint test-sqlite test-postgresql

test-quick: .venv/collected
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow"

test-sqlite: .venv/collected
	$(BIN)/pytest -n 3 --dist worksteal

test-postgresql: .venv/collected
	$(BIN)/pytest -n 2 --dist worksteal --postgresql

# On both engines, in all processes that the tests start, except for a test of processor time.
coverage: .venv/test
	$(BIN)/coverage erase
	$(BIN)/pytest -n 4 --dist worksteal --cov --cov-report= --cov-fail-under=0 \
	    --deselect tests/test_limits_of_clients.py::test_no_request_costs_more_than_its_bound
	$(BIN)/pytest -n 4 --dist worksteal --postgresql --cov --cov-append

test-python3.%: requirements-dev.txt requirements-postgresql.txt requirements.txt
	python3.$* -m venv .venv-3.$*
	.venv-3.$*/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	.venv-3.$*/bin/pytest -n 4 --dist worksteal

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

openapi: .venv/run
	$(BIN)/python docs/openapi.py

statements: .venv/test
	$(BIN)/python tests/statements.py

# Renew requirements.lock: every package of the service and its hashes, for every platform.
lock: .venv/test
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	    --no-annotate --no-header --no-config --output-file requirements.lock \
	    requirements-postgresql.txt

fuzz: .venv/test
	TASKD_FUZZ_EXAMPLES=500 $(BIN)/pytest tests/test_schemathesis.py tests/test_isolation.py

mutants: .venv/test
	$(BIN)/mutmut run $$($(BIN)/python tests/chapters.py \
	    Tokens Fields Bodies Requests Store Database Middleware)
	$(BIN)/mutmut results

audit: .venv/test
	$(BIN)/pip-audit --requirement requirements-postgresql.txt
	$(BIN)/deptry . --exclude 'tests|bench|mutants|\.venv.*' \
	    --requirements-files requirements-postgresql.txt

bench: .venv-bench/ready
	.venv-bench/bin/python bench/run.py
	PYTHONPATH=. .venv-bench/bin/python bench/growth.py
	.venv-bench/bin/python bench/latency.py

clean:
	rm -rf .venv .venv-bench .venv-3.* tests/openapi_clients/.venv
	rm -rf mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -rf __pycache__ */__pycache__ tests/*/node_modules examples/*/node_modules

# uv needs a tenth of the time of pip, which installs if uv is missing or fails.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)

define install
	@echo "Installing the packages of $(1) in .venv$(if $(2),, (pip takes about half a minute))"
	@$(if $(2),$(2) pip install --quiet --python $(BIN)/python -r $(1) ||) \
		$(BIN)/pip install --quiet --disable-pip-version-check -r $(1)
endef

examples/better-auth/node_modules/.installed: examples/better-auth/package-lock.json
	@command -v npm >/dev/null || \
		{ echo "make demo needs Node 20.19 or newer and npm: https://nodejs.org" >&2; exit 1; }
	@echo "Installing Better Auth ..."
	@npm ci --prefix examples/better-auth --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

OLD_PYTHON = taskd needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(OLD_PYTHON)")'
	@echo "Making a virtual environment in .venv"
	@$(if $(UV),uv venv --quiet --seed --allow-existing --python $(PYTHON) .venv ||) \
		$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/pip
	$(call install,requirements.txt,$(UV))
	@touch $@

.venv/test: requirements-dev.txt requirements-postgresql.txt requirements.txt | .venv/bin/pip
	@$(if $(UV),,$(BIN)/pip install --quiet --disable-pip-version-check \
		$$(grep ^uv== requirements-dev.txt))
	$(call install,requirements-dev.txt,$(or $(UV),$(BIN)/uv))
	@touch .venv/run $@

# In a fresh clone one process compiles the tests, and not each of five at the same time. If it
# fails, the run of the tests says why.
.venv/collected: | .venv/test
	@$(BIN)/pytest --collect-only -qq >/dev/null; touch $@

.venv-bench/ready: bench/requirements.txt requirements.txt requirements-postgresql.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	.venv-bench/bin/pip install --quiet --disable-pip-version-check \
	    --target .venv-bench/postgresql -r requirements-postgresql.txt
	@touch $@
