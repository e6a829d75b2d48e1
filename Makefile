# make quickstart   trains a small GPT on this machine and shows a sample
# make test         checks format, lint and types, then runs the default tests
#
# Both make .venv and install into it when pyproject.toml has changed. The default wheels use the CPU, whatever
# else is there; for an accelerator: make quickstart EXTRAS=cuda12 (or cuda13, tpu).
# PYTHON=... chooses the interpreter, VENV=... the folder, EXTRAS=a,b more of pyproject.toml's extras.

VENV ?= .venv
EXTRAS ?=
BIN := $(VENV)/bin
comma := ,
installed = $(VENV)/.installed-$(if $(1),$(1),core)

# Empty if the environment is missing, was left half made, or has lost its Python: it is made anew.
healthy := $(shell [ -e $(VENV)/.complete ] && $(BIN)/python -c 'import pip; print("yes")' 2>/dev/null)

.PHONY: quickstart test install clean anew

quickstart: $(call installed,$(EXTRAS))
	$(BIN)/python main.py --config configs/quickstart.py

test: $(call installed,test$(if $(EXTRAS),$(comma)$(EXTRAS)))
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist worksteal

install: $(call installed,$(EXTRAS))

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache

# A version manager's shim may exist and fail when it is run, Debian's python3 may lack ensurepip: try each.
$(VENV)/.installed-%: pyproject.toml $(if $(healthy),,anew)
	$(if $(healthy),,@for python in "$$PYTHON" python3 python3.13 python3.12 python3.11 ""; do \
		"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: no Python >= 3.11 that runs and has venv was found; try make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	echo "$$python -m venv --clear $(VENV)"; "$$python" -m venv --clear $(VENV))
	@rm -f $(VENV)/.complete
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".$(if $(filter-out core,$*),[$*])"
	@touch $(VENV)/.complete $@
