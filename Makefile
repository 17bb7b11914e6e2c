# make demo    prune the bundled model and see what became of it
# make test    the same, then every test
# make check   formatting, lint, types, tests: what has to pass before a commit
# make format  put the formatting right
# make families  prune every family that transformers knows, tiny, and write docs/families.md
# make wheel   build the wheel into dist/
# make clean   remove what was built; the environment .venv stays
#
# All but clean first make .venv, with the versions of constraints.txt. PYTHON chooses the interpreter
# (3.11 or newer), EXTRAS the optional dependencies: make test EXTRAS=dev,plot,eval

PYTHON ?=
EXTRAS ?= dev,plot

comma := ,
stamp := .venv/.installed-$(subst $(comma),-,$(EXTRAS))
python := .venv/bin/python

.DELETE_ON_ERROR:
.PHONY: demo test check lint types format families wheel clean

demo: $(stamp)
	.venv/bin/python -m llmprune --model demo --sparsity 0.6 --method sparsegpt

test: demo
	@OMP_NUM_THREADS=1 $(python) -m pytest -n auto --dist worksteal

check: lint types
	@OMP_NUM_THREADS=1 $(python) -m pytest -n auto --dist worksteal

lint: $(stamp)
	$(python) -m ruff format --check .
	$(python) -m ruff check .

types: $(stamp)
	$(python) -m mypy

format: $(stamp)
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

families: $(stamp)
	$(python) tests/families.py

wheel: $(stamp)
	$(python) -m build --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is taken up again. A .venv without a working pip
# was itself interrupted, and is made anew.
$(stamp): pyproject.toml constraints.txt
	@set -e; \
	if ! $(python) -m pip --version >/dev/null 2>&1; then \
	    for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            found=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$${found:-}" ]; then \
	        echo "llmprune needs Python 3.11 or newer; $(if $(PYTHON),$(PYTHON) is not,none was found): make PYTHON=python3.12" >&2; \
	        exit 1; \
	    fi; \
	    if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$found cannot make a virtual environment: it has no ensurepip. On Debian and Ubuntu: apt install $$("$$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; \
	        exit 1; \
	    fi; \
	    echo "making .venv with $$("$$found" --version)"; \
	    "$$found" -m venv --clear .venv; \
	fi
	$(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
