# `make demo` trains a small language model on the CPU. `make test` runs every test with the lowest supported JAX.
# Both first make .venv with a Python that they find by themselves.

.PHONY: demo test test-latest test-gpu fuzz-gpu sanitize lint clean

# The virtual environments have no CUDA libraries: without this JAX looks for them and complains.
export JAX_PLATFORMS ?= cpu

demo: .venv/demo
	.venv/bin/python examples/1_train_a_llama.py

# On every core, up to eight: a process of the tests needs a gigabyte or two.
pytest = -m pytest -n auto --maxprocesses 8 --dist worksteal

test: .venv/test
	.venv/bin/python $(pytest)

test-latest: .venv-latest/test
	.venv-latest/bin/python $(pytest)

# On a machine with a GPU, by the Python that jtile[cuda13] and the tests' extra are installed in.
python ?= python
test-gpu fuzz-gpu sanitize: export JAX_PLATFORMS :=

test-gpu:
	$(python) -m pytest -m gpu

fuzz-gpu:
	$(python) -m tests.compiler.fuzz --gpu --examples 2000 --processes 10

sanitize:
	$(python) -m tests.sanitize --processes 4

lint: .venv/test
	.venv/bin/ruff check
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-latest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

everything := '.[models,offline,test]'

# The lowest JAX is tested on the lowest Python, the newest on the newest.
.venv/demo: pyproject.toml constraints-lowest.txt
	$(call install,.venv,3.12 3.13 3.14,--constraint constraints-lowest.txt --editable '.[models]')

.venv/test: pyproject.toml constraints-lowest.txt
	$(call install,.venv,3.12 3.13 3.14,--constraint constraints-lowest.txt --editable $(everything))

.venv-latest/test: pyproject.toml
	$(call install,.venv-latest,3.13 3.12 3.14,--upgrade --editable $(everything))

# $(call install,FOLDER,PYTHON VERSIONS,PIP ARGUMENTS): the rule's target is the stamp that says that this is done.
# FOLDER/installing outlives an interrupted installation, and the next one then starts from an empty environment,
# as it does where the environment's Python has gone.
define install
@set -eu; \
if [ -e $(1)/installing ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	python=$$($(call find_python,$(2))); \
	echo "$(1): $$("$$python" --version) from $$python"; \
	"$$python" -m venv --clear $(1); \
fi; \
echo "$(1): installing (minutes the first time)"; \
touch $(1)/installing; \
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3); \
rm $(1)/installing; \
touch $@
endef

# Prints the first Python that runs (a pyenv shim may not), is new enough and can make environments.
define find_python
{ for version in $(1); do command -v python$$version || true; done; \
  command -v python3 || true; \
  for version in $(1); do ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*[0-9]/bin/python 2>/dev/null || true; done; \
} | { while read -r python; do \
	if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 </dev/null; \
	then echo "$$python"; exit 0; fi; \
done; \
echo "jtile needs Python 3.12 or newer: install one (for example 'pyenv install 3.13' or 'uv python install 3.13')," \
	"then run make again." >&2; exit 1; }
endef
