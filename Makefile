# Two commands are all a newcomer needs: `make demo` and `make test`. Each installs what it needs once.
# Distributions build Python with profiles (PGO), pyenv by default does not: there a start takes half as long again
# (benchmarks/README.md). So theirs comes first, where it can make environments; `make PYTHON=python3` takes the one on the PATH.
ifndef PYTHON
PYTHON := $(shell for python in /usr/bin/python3.1[123]; do \
    if "$$python" -c "import ensurepip" 2>/dev/null; then echo "$$python"; exit; fi; done; echo python3)
endif
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all test-engines clients check clean

install: $(STAMP)

# bubblewrap makes the sandboxes, cc the load of the benchmarks. They are system packages: root installs them here, others are told how, once.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Verbatim needs Python 3.11 or newer; set PYTHON=…")'
	@command -v bwrap >/dev/null 2>&1 || { if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    (apt-get update -qq || true) && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends bubblewrap; \
	  else echo "bubblewrap is not installed: sandboxes need it (Debian: apt-get install bubblewrap)" >&2; fi; }
	@command -v cc >/dev/null 2>&1 || { if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    (apt-get update -qq || true) && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends gcc libc6-dev; \
	  else echo "no C compiler is installed: the benchmarks of load and their tests need cc (Debian: apt-get install gcc libc6-dev)" >&2; fi; }
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    (apt-get update -qq || true) && export DEBIAN_FRONTEND=noninteractive && \
	    apt-get install -y -qq --no-install-recommends postgresql-common && \
	    sed -i "s/^#\?create_main_cluster.*/create_main_cluster = false/" /etc/postgresql-common/createcluster.conf && \
	    apt-get install -y -qq --no-install-recommends postgresql; \
	  else echo "PostgreSQL is not installed: the tests need it (Debian: apt-get install postgresql)" >&2; fi; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -c constraints.txt -e '.[train,dev]'
	# As pip does for a wheel: where PYTHONDONTWRITEBYTECODE is set, each start would compile all of it again (0.6 s).
	$(BIN)/python -m compileall -q gateway engines sandbox trainer
	@touch $(STAMP)

demo: install
	$(BIN)/verbatim demo

# In order of their folders: by themselves the files of fewest tests come last, which are the long ones, and one core waits for the other.
test: install clients
	$(BIN)/python -m pytest -m "not slow and not real_engine" -n 2 --dist loadfile --no-loadscope-reorder

# Everything of `make test`, and the long soak runs.
test-all: install clients
	$(BIN)/python -m pytest -m "not real_engine"

# The clients of others that the tests run unmodified, in environments of their own (0.7 GB; nothing if they are there).
clients:
	PYTHON=$(PYTHON) tests/clients/install.sh

# The real SGLang and the real vLLM on this CPU, one after the other, each in an environment of its own (2.7 and 2.4 GB).
test-engines: install
	PYTHON=$(PYTHON) tests/real_engines/install.sh sglang
	PYTHON=$(PYTHON) tests/real_engines/install.sh vllm
	$(BIN)/python -m pytest -m real_engine

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-clients .venv-harbor .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
