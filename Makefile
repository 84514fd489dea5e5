# Everything is built in a private venv (.venv) and cargo's target directory; nothing is installed elsewhere.
# Stamp files in .venv make a second run quick.

VENV := .venv
PY := $(VENV)/bin/python
CAPTURE := tests/data/linux-6.18.15-x86_64/handover.elf
FUZZ_SECONDS ?= 60
# `make attack`: seconds for each law of tests/attack, and for each fuzz target.
ATTACK_SECONDS ?= 60
ATTACK_FUZZ_SECONDS ?= 30
# Tests of the installed wheel: all except those that take long and have already passed with the same code.
WHEEL_TESTS ?= -k 'not (terabyte or fleet or crash or examples or docs or attack)'

# What uses click, rich, numpy, safetensors, matplotlib, dask, pyarrow and cryptography.
OLDEST_TESTS ?= $(addprefix tests/test_,cli.py doctor_cli.py fleet.py live.py live_safetensors.py live_values.py map.py package.py)

unexport PYTHONPATH PYTHONHOME CONDA_PREFIX
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYO3_PYTHON := $(CURDIR)/$(PY)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(PATH):$(HOME)/.cargo/bin
# Both workspaces share it; the benches are a separate workspace with a separate lock file.
export CARGO_TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -path rust/fuzz -prune -o \( -name '*.rs' -o -name Cargo.toml \) -print)
PYTHON_SOURCES := $(shell find python -name '*.py' -o -name '*.pyi' -o -name py.typed)

.NOTPARALLEL:
LAB_OPTIONS = $(if $(ONLY),--only '$(ONLY)') $(if $(KERNEL),--kernel '$(KERNEL)') $(if $(KERNELS),--kernels '$(KERNELS)') \
    $(if $(ALL),--all) $(if $(LAB_SAVE),--save)

# `make wheels`: targets of rustc. The C library decides on the policy: manylinux2014 (glibc 2.17), musllinux_1_2.
WHEEL_TARGETS ?= x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu x86_64-unknown-linux-musl aarch64-unknown-linux-musl

.PHONY: help run test check fmt words clippy ruff mypy stubtest test-rust test-python test-debug test-v3 wheel wheels licenses release-check release-urls wheel-check test-oldest bench guard charts fuzz attack lab docs site format clean need need-test

help:
	@echo 'make run     build kho, show what a real Linux kernel handed over, then hand memory over and take it back'
	@echo 'make test    every check and test: linters, types, Rust, Python, the wheel'
	@echo 'make check   the linters and type checkers only'
	@echo 'make words   banned words, unknown options and references in documentation'
	@echo 'make format  reformat the sources'
	@echo 'make docs    run the commands in docs/ and store their output there; write manual pages'
	@echo 'make site    dist/site: the documentation as a site, with the API; SITE_VERSION=V publishes it (mike)'
	@echo 'make bench   speed, as a table of ratios: ten minutes; BENCH_JSON=FILE keeps every sample'
	@echo 'make guard   compare the instruction counts of the hot paths with the committed ones'
	@echo 'make charts  docs/charts: overhead by density, time by size; two minutes, 1.2 GiB'
	@echo 'make fuzz    hostile input for FUZZ_SECONDS=$(FUZZ_SECONDS) a target'
	@echo 'make attack  laws over hostile input, and every fuzz target: ten minutes, from a new ATTACK_SEED'
	@echo 'make lab     boot real kernels in virtual machines, and hold kho to them: lab/README.md; ONLY=, ALL=1, KERNEL=, KERNELS='
	@echo 'make wheel   dist/: the source distribution, and a wheel built from it'
	@echo 'make wheels  dist/: the source distribution, and wheels for WHEEL_TARGETS, linked by zig; needs rustup'
	@echo 'make clean   remove everything that was built'
	@echo
	@echo 'After `make run`, $(VENV)/bin/kho is the command and $(PY) a Python in which kho is installed.'

need:
	@scripts/need.sh build

need-test:
	@scripts/need.sh test

# First the venv with the build backend, then the packages for tests, then kho itself, editable, in release profile.

$(VENV)/.stamp-base: pyproject.toml | need
	@[ -x $(PY) ] && $(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $$(scripts/need.sh python) -m venv $(VENV); }
	$(PY) -m pip install -q --upgrade 'pip>=25.1'
	$(PY) -m pip install -q $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-base
	$(PY) -m pip install -q --group dev
	@touch $@

$(VENV)/.stamp-site: $(VENV)/.stamp-base
	$(PY) -m pip install -q --group site
	@touch $@

$(VENV)/.stamp-kho: $(VENV)/.stamp-base $(RUST_SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e .
	@touch $@

run: need $(VENV)/.stamp-kho
	@echo; echo '$$ kho inspect $(CAPTURE)'
	@$(VENV)/bin/kho inspect $(CAPTURE)
	@echo; echo '$$ python examples/round_trip.py'
	@$(PY) examples/round_trip.py

# The checks, fastest first.

fmt:
	cargo fmt --all --check
	cargo fmt --manifest-path benches/Cargo.toml --check

clippy: $(VENV)/.stamp-base
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
	cargo clippy --quiet --locked --manifest-path benches/Cargo.toml --all-targets -- -D warnings

# Banned words, options that no command has, references to sections that docs/abi.md does not have.
WORDS := *.md docs findings benches contrib examples scripts python rust tests lab \
    Makefile .ci .github .pre-commit-config.yaml

words: need
	@$$(scripts/need.sh python) scripts/words.py $(WORDS)

ruff: $(VENV)/.stamp-dev
	$(PY) -m ruff check --quiet
	$(PY) -m ruff format --quiet --check

mypy: $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) -m mypy

stubtest: $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) -m mypy.stubtest --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist kho._kho

test-rust: $(VENV)/.stamp-base
	cargo test --quiet --locked -p kho
	cargo test --quiet --locked --manifest-path benches/Cargo.toml

test-python: $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) -m pytest --benchmark-skip

# The extension with debug assertions and overflow checks, and compiled for newer processors: undefined behavior that one build
# tolerates often crashes another. The copies of the package are in target/, not in python/.

DEBUG_TESTS := $(addprefix tests/,test_tracker.py test_bulk.py test_arena.py test_outgoing.py test_incoming.py test_safety.py test_threads.py)
V3_TESTS := $(addprefix tests/,test_tracker.py test_bulk.py test_safety.py)
V3_FLAGS := avx2 bmi1 bmi2 fma movbe abm f16c

test-debug: $(VENV)/.stamp-dev
	PYTHON=$(PY) scripts/variant.sh debug '' $(DEBUG_TESTS)

test-v3: $(VENV)/.stamp-dev
	@flags=" $$(sed -n 's/^flags[^:]*://p' /proc/cpuinfo | head -1) "; \
	for flag in $(V3_FLAGS); do \
	    case "$$flags" in *" $$flag "*) ;; *) echo "test-v3: skipped, this processor has no $$flag"; exit 0 ;; esac; \
	done; \
	PYTHON=$(PY) scripts/variant.sh v3 '-C target-cpu=x86-64-v3' $(V3_TESTS)

check: need-test fmt words clippy ruff mypy stubtest

test: check site test-rust guard test-python test-debug test-v3 wheel-check test-oldest
	@echo 'make test: all passed'

# The wheel is built from the source distribution, so one build tests both.

dist/.stamp: $(VENV)/.stamp-base $(RUST_SOURCES) $(PYTHON_SOURCES) pyproject.toml README.md LICENSE $(shell find wheel-data -type f)
	rm -rf dist
	$(PY) -m maturin build --sdist --release --locked --quiet --out dist
	@touch $@

wheel: need dist/.stamp
	@ls -l dist

# Those for this machine are installed and tested with each Python of WHEEL_PYTHONS.
wheels: need $(VENV)/.stamp-base
	rm -rf dist
	$(PY) -m pip install -q ziglang
	$(PY) -m maturin sdist --quiet --out dist
	PYTHON=$(PY) PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/wheels.sh dist $(WHEEL_TARGETS)
	$(PY) scripts/try_wheels.py dist
	@ls -l dist

# docs/releasing.md. TAG=v0.1.0; URL of the repository, REF for links into it.
release-check: need
	@$$(scripts/need.sh python) scripts/release.py check '$(TAG)'

release-urls: need
	$$(scripts/need.sh python) scripts/release.py urls '$(URL)' '$(or $(REF),main)'

licenses: need
	$$(scripts/need.sh python) scripts/licenses.py

wheel-check: dist/.stamp
	rm -rf .venv-wheel
	$(PY) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/python -I -c 'import kho, sys; assert sys.prefix in kho.__file__, kho.__file__'
	.venv-wheel/bin/python -m pip install -q --upgrade 'pip>=25.1'
	.venv-wheel/bin/python -m pip install -q --group dev
	.venv-wheel/bin/python -m pytest -q --benchmark-skip $(WHEEL_TESTS)

# The wheel with the oldest dependencies that pyproject.toml allows. What these warn of is theirs.
test-oldest: dist/.stamp
	rm -rf .venv-oldest
	$(PY) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q $$($(PY) scripts/oldest.py pytest hypothesis ml_dtypes) dist/*.whl
	.venv-oldest/bin/python -m pytest -q -o filterwarnings=default $(OLDEST_TESTS)

bench: need $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	PYTHON=$(PY) sh benches/run $(if $(BENCH_JSON),--json $(abspath $(BENCH_JSON)))

guard: need
	$$(scripts/need.sh python) benches/guard

charts: $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) benches/chart.py

fuzz: need $(VENV)/.stamp-dev
	PYTHON=$(PY) rust/fuzz/run $(FUZZ_SECONDS)

attack: need $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	@seed=$${ATTACK_SEED:-$$(date +%s)}; echo "ATTACK_SEED=$$seed ATTACK_SECONDS=$(ATTACK_SECONDS)"; \
	ATTACK_SEED=$$seed ATTACK_SECONDS=$(ATTACK_SECONDS) $(PY) -m pytest --benchmark-skip tests/attack
	PYTHON=$(PY) rust/fuzz/run $(ATTACK_FUZZ_SECONDS)

# Real kernels: 35 minutes on two idle cores the first time, which builds them; 7 later. LAB_SAVE=1 keeps the results in lab/results.
lab: need $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) -m lab $(LAB_OPTIONS)

docs: $(VENV)/.stamp-dev $(VENV)/.stamp-kho
	$(PY) scripts/docs.py

# A link or an anchor without its target is an error.
site: export NO_MKDOCS_2_WARNING := 1
site: $(VENV)/.stamp-kho $(VENV)/.stamp-site
	$(PY) -m mkdocs build --strict --quiet
	$(if $(SITE_VERSION),$(VENV)/bin/mike deploy --push --update-aliases '$(SITE_VERSION)' latest)

format: $(VENV)/.stamp-dev
	cargo fmt --all
	cargo fmt --manifest-path benches/Cargo.toml
	$(PY) -m ruff check --quiet --fix-only
	$(PY) -m ruff format --quiet

clean:
	-cargo clean --quiet
	rm -rf $(VENV) .venv-wheel .venv-oldest dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find python tests -name __pycache__ -prune -exec rm -rf {} + -o -name '_kho*.so' -exec rm -f {} +
