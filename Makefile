# Everything a user or a contributor runs. Two environments: .venv as users have it, .venv-test with all that tests need.

PYTHON ?= python3
PYTEST_ARGS ?=
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES = $(shell find models export comparisons serving -type f -not -path '*/__pycache__/*' -not -path '*/checkpoint/*' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test check check-slow check-ray check-mlx commands format bundles clean programs image-programs

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## install into .venv and show both answers side by side; KEEP=1 keeps serving the page
	.venv/bin/nearfar demo $(if $(filter 1,$(KEEP)),--keep)

test: .venv-test/.installed programs  ## install into .venv-test and run the tests, two files at once; PYTEST_ARGS='-k name' to choose
	.venv-test/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

check: .venv-test/.installed  ## everything before a commit: formatting, lint, types, tests
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy
	@$(MAKE) --no-print-directory test

check-slow: .venv-test/.installed programs image-programs  ## the tests marked slow, and those in environments of their own
	.venv-test/bin/python -m pytest -m "slow and not gpu and not ray and not mlx" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory check-ray
	@$(MAKE) --no-print-directory check-mlx

check-ray: .venv-ray/.installed programs  ## the tests that need Ray, in an environment of its own
	.venv-ray/bin/python -m pytest -m ray $(PYTEST_ARGS)

check-mlx: .venv-mlx/.installed  ## the tests of the export to MLX, in an environment of its own
	.venv-mlx/bin/python -m pytest -m mlx tests/export/test_mlx.py $(PYTEST_ARGS)

commands: .venv-test/.installed  ## the documentation's commands that no test runs, and why
	@.venv-test/bin/python -m tests.readmes

format: .venv-test/.installed  ## format, and repair what lint can repair
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

bundles: .venv-test/.installed  ## export the embedded model's bundles from its checkpoint
	for recipe in int8 fp32; do \
		.venv-test/bin/nearfar export models/tiny_scenes/checkpoint --recipe $$recipe --name tiny-scenes \
			--license Apache-2.0 --auto-tile-px 256 --notice "$$(cat models/tiny_scenes/NOTICE)" \
			--out models/tiny_scenes/bundles/$$recipe || exit 1; \
	done

clean:  ## remove the environments and all that tools left behind
	rm -rf .venv .venv-test .venv-ray .venv-mlx build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed as users install it, so a changed source is installed again. build/ goes first: setuptools would pack what lies there.
.venv/.installed: pyproject.toml constraints.txt $(SOURCES)
	@test -x .venv/bin/python || { echo "== making .venv"; $(PYTHON) -m venv .venv; }
	@echo "== installing nearfar[hosted] into .venv (half a minute the first time)"
	@rm -rf build
	@.venv/bin/python $(PIP_INSTALL) --no-compile '.[hosted]'
	@rm -rf build
	@touch $@

# torch first, and alone: asked for by its exact version, pip takes a CPU build where one is at hand; asked for by another
# package it may take one with several GB of CUDA.
.venv-test/.installed: pyproject.toml constraints.txt
	@test -x .venv-test/bin/python || { echo "== making .venv-test"; $(PYTHON) -m venv .venv-test; }
	@echo "== installing torch into .venv-test (a minute or two the first time)"
	@.venv-test/bin/python $(PIP_INSTALL) torch==2.13.0
	@echo "== installing nearfar[hosted,video,documents,report,openvino,export,finetune,dev] into .venv-test (a minute or two the first time)"
	@.venv-test/bin/python $(PIP_INSTALL) --editable '.[hosted,video,documents,report,openvino,export,finetune,dev]'
	@touch $@

# mlx-vlm needs a newer transformers, tokenizers and huggingface-hub than nearfar: hence all of them by its own list.
.venv-mlx/.installed: pyproject.toml constraints.txt export/mlx-requirements.txt
	@test -x .venv-mlx/bin/python || { echo "== making .venv-mlx"; $(PYTHON) -m venv .venv-mlx; }
	@echo "== installing mlx-vlm into .venv-mlx (a minute or two the first time)"
	@.venv-mlx/bin/python -m pip install --quiet --disable-pip-version-check --requirement export/mlx-requirements.txt
	@.venv-mlx/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@.venv-mlx/bin/python $(PIP_INSTALL) hypothesis pytest pytest-asyncio pytest-socket pytest-timeout
	@touch $@

# What does not go together with the rest, or is large: .venv-NAME has the extra of that name and what tests need.
.venv-%/.installed: pyproject.toml constraints.txt
	@test -x .venv-$*/bin/python || { echo "== making .venv-$*"; $(PYTHON) -m venv .venv-$*; }
	@echo "== installing nearfar[hosted,dev,$*] into .venv-$* (a minute or two the first time)"
	@.venv-$*/bin/python $(PIP_INSTALL) --editable '.[hosted,dev,$*]'
	@touch $@

define INSTALL_MISSING
if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "The tests need $$missing: install them, and run this again." >&2; exit 1; \
	fi; \
	sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi; \
	if [ -n "$$sudo" ] && ! command -v sudo >/dev/null; then \
		echo "The tests need $$missing: run 'apt-get install $$missing' as root, and run this again." >&2; exit 1; \
	fi; \
	echo "== installing $$missing with apt-get"; \
	$$sudo apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -qq --yes --no-install-recommends $$missing >/dev/null || { \
		echo "$$missing could not be installed with apt-get: install by hand, and run this again." >&2; exit 1; \
	}
endef

# The page's tests drive a browser, those of the records start a PostgreSQL of their own, and another looks at what leaves a
# network namespace. Without these programs they would be skipped, and nobody would know.
programs:
	@missing=; \
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing="chromium fonts-dejavu-core"; \
	command -v ip >/dev/null || [ "$$(uname)" != Linux ] || missing="$$missing iproute2"; \
	command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$$missing postgresql"; \
	$(INSTALL_MISSING)

# The tests of the images and of an emulated Arm processor run as root on Debian; elsewhere they are skipped and say so.
image-programs:
	@missing=; \
	if [ "$$(id -u)" != 0 ] || [ "$$(uname)" != Linux ] || ! command -v apt-get >/dev/null; then exit 0; fi; \
	for program in podman runc debootstrap; do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	command -v qemu-aarch64-static >/dev/null || missing="$$missing qemu-user-static"; \
	$(INSTALL_MISSING)
