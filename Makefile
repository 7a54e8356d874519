# fastebm: set-up, demo, tests. `make` alone lists what there is.
#
# Everything runs in the environment .venv, which is made on first need and installed again only when the build changed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_OUT ?= runs/demo
PYTEST_ARGS ?=
# Processes that run tests side by side; a file of tests stays in one.
WORKERS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow browser sanitize fuzz lint format docs docs-serve bench gpu-kit kit-python wheel sdist release-check clean distclean

# --- the environment -------------------------------------------------------------------------------------------------

# SYSTEM=1, or an empty VENV, uses the environment of $(PYTHON) as it is, without making one of our own.
ifneq ($(strip $(SYSTEM)),)
override VENV :=
endif
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMPS := build/stamps-$(shell "$(PYTHON)" -c 'import sys, zlib; print(zlib.crc32(sys.prefix.encode()))')
ENVIRONMENT :=
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
ENVIRONMENT := $(VENV)/bin/python
endif

PIP := "$(PY)" -m pip --disable-pip-version-check
RUN := PYTHONUNBUFFERED=1 "$(PY)"
# Threads that wait give way to those of the other process.
TESTS := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n $(WORKERS) --dist loadfile
BUILD_INPUTS := pyproject.toml setup.py fastebm/build_extension.py \
                $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

define say
@printf '\n\033[1m== %s\033[0m\n' '$(1)'
endef

# Python programs of the set-up, handed to `python -c` through the environment so that no quoting is needed.
define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f"fastebm needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}: say PYTHON=python3.11")
endef

define HAS_TORCH
import sys
try:
    import torch
except Exception:
    sys.exit(1)
sys.exit(tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11))
endef

# A virtual environment can't inherit from another one. Where $(PYTHON) is one that holds torch, ours is laid over it by
# a .pth file.
define LAY_OVER_PARENT
import pathlib, site, sys, sysconfig
target = pathlib.Path(sys.argv[1]).resolve() / pathlib.Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
target.joinpath("parent_environment.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
endef
export CHECK_PYTHON HAS_TORCH LAY_OVER_PARENT

help:
	@printf 'make demo     train a coarse-to-fine energy model on handwritten digits and sample from it, into $(DEMO_OUT)\n'
	@printf 'make test     the whole test suite (PYTEST_ARGS="-k normal", say, for a part of it)\n'
	@printf 'make test-slow  the tests that take minutes\n'
	@printf 'make browser  what tests of pages in a real browser need, besides Chromium itself; `make test` skips them without\n'
	@printf 'make sanitize the operators under AddressSanitizer and UBSan, with emulated matrix units\n'
	@printf 'make fuzz     2,000 hostile tries of each entrance: command line, files, checkpoints, operators, signals\n'
	@printf 'make install  what both need: the environment $(VENV), torch, fastebm with its compiled operators\n'
	@printf 'make lint     ruff, mypy, import-linter        make format   rewrite the sources in the house format\n'
	@printf 'make docs     the documentation site, into build/site   make docs-serve   it in a browser, as pages change\n'
	@printf 'make bench    benchmarks                       make wheel    dist/*.whl for this platform\n'
	@printf 'make gpu-kit  operators compiled for a GPU machine (KIT_PYTHON=python3.12), into build/gpu-kit\n'
	@printf 'make sdist    dist/*.tar.gz                    make release-check  what a release consists of, built, installed and run\n'
	@printf 'make clean    what builds and tests left       make distclean   that and the environment\n'
	@printf '\nPYTHON=python3.12   the interpreter           VENV=dir        another environment\n'
	@printf 'TORCH=torch==2.12.0 the torch to install       SYSTEM=1        install into the environment of PYTHON itself\n'
	@printf 'A torch >= 2.11 that PYTHON already has is kept.\n'

$(VENV)/bin/python:
	$(call say,Making the environment $(VENV))
	@"$(PYTHON)" -c "$$CHECK_PYTHON"
	@if ! "$(PYTHON)" -c "$$HAS_TORCH"; then \
	    "$(PYTHON)" -m venv "$(VENV)"; \
	elif "$(PYTHON)" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then \
	    echo "keeping the torch of the virtual environment of $(PYTHON)"; \
	    "$(PYTHON)" -m venv "$(VENV)"; "$(PYTHON)" -c "$$LAY_OVER_PARENT" "$(VENV)"; \
	else \
	    echo "keeping the torch that $(PYTHON) has"; \
	    "$(PYTHON)" -m venv --system-site-packages "$(VENV)"; \
	fi
	@$(PIP) install --quiet --upgrade pip

# torch comes first and pinned, because the compiled operators are built against it, without build isolation. numpy
# comes along because torch complains without.
# compat: a path, and not a finder behind a folder named fastebm that the user may stand beside.
$(STAMPS)/base: $(BUILD_INPUTS) | $(ENVIRONMENT)
	$(call say,Installing fastebm)
	@"$(PY)" -c "$$CHECK_PYTHON"
	@$(PIP) install --quiet 'setuptools>=77.0.3' wheel
	@if "$(PY)" -c "$$HAS_TORCH"; then \
	    "$(PY)" -c 'import torch; print(f"torch {torch.__version__} is there and is kept")'; \
	else \
	    echo 'installing $(TORCH)'; $(PIP) install '$(TORCH)' numpy; \
	fi
	@echo 'building and installing fastebm: some minutes of two cores'
	@$(PIP) install --quiet --no-build-isolation --editable . --config-settings editable_mode=compat
	@$(RUN) -m fastebm info
	@mkdir -p "$(@D)" && touch "$@"

# fastebm[...] is installed already, so pip adds what the extra names and builds nothing again.
$(STAMPS)/%: $(STAMPS)/base
	$(call say,Installing what `make $*` needs)
	@$(PIP) install --quiet 'fastebm[$*]'
	@mkdir -p "$(@D)" && touch "$@"

# GPU kernels are compiled by the oldest Triton, too, which lies in a folder beside the environment's own. Tests that need
# it are skipped, and say so, where it can't be had: it is tried again each time then.
OLDEST_TRITON := 3.6.0
OLDEST_TRITON_FOLDER := $(if $(VENV),$(VENV),build)/triton-$(OLDEST_TRITON)
$(STAMPS)/triton-$(OLDEST_TRITON): $(STAMPS)/test
	@if "$(PY)" -c 'import triton' 2>/dev/null; then \
	    printf '\nInstalling Triton %s into %s\n' '$(OLDEST_TRITON)' '$(OLDEST_TRITON_FOLDER)'; \
	    rm -rf "$(OLDEST_TRITON_FOLDER)"; \
	    if $(PIP) install --quiet --no-deps --target "$(OLDEST_TRITON_FOLDER)" 'triton==$(OLDEST_TRITON)'; then \
	        mkdir -p "$(@D)" && touch "$@"; \
	    else \
	        echo 'it was not to be had; tests that need it are skipped'; \
	    fi; \
	fi

# --- the commands ----------------------------------------------------------------------------------------------------

install: $(STAMPS)/base
	@echo 'fastebm is installed for $(PY)'

demo: $(STAMPS)/base
	$(call say,Training and sampling the demo)
	@$(RUN) -m fastebm demo --out "$(DEMO_OUT)"

# Triton's interpreter is chosen when triton is first imported, hence a process of its own. Its 5 means that PYTEST_ARGS
# selects none of the operators' tests.
test: $(STAMPS)/test $(STAMPS)/triton-$(OLDEST_TRITON)
	$(call say,The test suite)
	@FASTEBM_OLDEST_TRITON="$(OLDEST_TRITON_FOLDER)" $(TESTS) tests $(PYTEST_ARGS)
	$(call say,The operators in Triton'"'"'s interpreter)
	@if "$(PY)" -c 'import triton' 2>/dev/null; then \
	    TRITON_INTERPRET=1 FASTEBM_BACKEND=triton $(TESTS) tests/ops $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	else \
	    echo 'skipped: triton is not installed (it has wheels for Linux on x86_64 only)'; \
	fi

# Statistics over more than 10^8 draws, among others.
test-slow: $(STAMPS)/test $(STAMPS)/triton-$(OLDEST_TRITON)
	$(call say,The tests that take minutes)
	@FASTEBM_OLDEST_TRITON="$(OLDEST_TRITON_FOLDER)" $(RUN) -m pytest tests -m slow $(PYTEST_ARGS)
	@$(RUN) -m pytest tests/fuzz --tries 2000 $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory sanitize

# Drives the Chromium of the system, which is not installed here.
browser: $(STAMPS)/browser
	@command -v chromium chromium-browser google-chrome chrome | head -1 | grep . || \
	    { echo 'there is no Chromium here: `apt install chromium` of Debian has one' >&2; exit 1; }

# A build of its own in build/sanitize. torch is not built with sanitizers, so their libraries come first by LD_PRELOAD;
# leaks are Python's own business. SANITIZE_TRIES of the fuzzer of raw operators.
SANITIZE_TRIES ?= 2000
sanitize: $(STAMPS)/test
	$(call say,The operators under AddressSanitizer and UBSan)
	@$(RUN) tests/sanitize.py --tries $(SANITIZE_TRIES) $(PYTEST_ARGS)

fuzz: $(STAMPS)/test
	$(call say,Hostile tries)
	@$(RUN) -m pytest tests/fuzz --tries 2000 $(PYTEST_ARGS)

lint: $(STAMPS)/lint
	$(call say,ruff)
	@"$(PY)" -m ruff check .
	@"$(PY)" -m ruff format --check .
	$(call say,mypy)
	@"$(PY)" -m mypy
	$(call say,import-linter)
	@"$(PY)" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'

format: $(STAMPS)/lint
	@"$(PY)" -m ruff check --fix --exit-zero .
	@"$(PY)" -m ruff format .

# Warnings are errors: a link or an anchor that leads nowhere, a page without a place, a name that the reference can't find.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs
docs: $(STAMPS)/docs
	$(call say,The documentation site)
	@$(MKDOCS) build --strict

docs-serve: $(STAMPS)/docs
	@$(MKDOCS) serve

# Some 20 minutes on two cores. PYTEST_ARGS='-k cascade' measures a part, '--full' everything, '--base main' ours against
# ours at another revision. Rows that are not measured anew stay.
bench: $(STAMPS)/bench
	$(call say,Benchmarks)
	@$(RUN) -m pytest benchmarks -q -s --save benchmarks/results $(PYTEST_ARGS)
	@$(RUN) -m benchmarks.harness.speed_pages

# Compiled operators for a GPU machine, in build/gpu-kit: for its Python, which may be another one than ours.
KIT_PYTHON ?= $(PYTHON)
kit-python: # before anything is built
	@command -v "$(KIT_PYTHON)" >/dev/null || { echo 'KIT_PYTHON: there is no Python $(KIT_PYTHON) here' >&2; exit 2; }
gpu-kit: kit-python $(STAMPS)/base
	$(call say,The kit for a GPU machine)
	@$(RUN) -m benchmarks.gpu.kit build/gpu-kit "$(KIT_PYTHON)"

wheel: $(STAMPS)/base
	$(call say,Building a wheel)
	@rm -rf build/lib* build/bdist*
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

sdist: $(STAMPS)/base
	$(call say,Building a source distribution)
	@"$(PY)" -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	@ls -l dist/*.tar.gz

# Of the last commit; it compiles everything anew. RELEASE_ARGS: --final for a release, --stand-ins, --cuda, --out FOLDER.
release-check: $(STAMPS)/base
	$(call say,The release)
	@$(RUN) tests/packaging/release_check.py --torch '$(TORCH)' --oldest-triton 'triton==$(OLDEST_TRITON)' $(RELEASE_ARGS)

clean:
	rm -rf build dist *.egg-info fastebm/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	rm -rf $(if $(VENV),"$(VENV)/stamps")
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(if $(VENV),"$(VENV)")
