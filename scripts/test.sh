#!/usr/bin/env bash
# Creates a virtual environment, installs the package with its development tools, and runs lint, types and tests; builds
# the documentation site, into build/site.
#
#   bash scripts/test.sh [arguments for pytest]
#
# HF_MBP_VENV names the environment (default: .venv-test); it is kept and used again.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
venv="${HF_MBP_VENV:-.venv-test}"

if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
fi
# Plain `torch` may bring gigabytes of CUDA libraries; this version is the one that is tested.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
if [ ! -d "$venv/deepspeed" ]; then
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$venv/deepspeed" --requirement tests/distributed/deepspeed.txt
fi

# One thread a process: the tests run in as many processes as there are cores, and tiny models gain nothing from more.
# nproc says 1 where OMP_NUM_THREADS is 1, so it is asked before.
cores="$(nproc)"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

echo "== lint"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
echo "== types"
"$venv/bin/mypy"
echo "== documentation"
# Not --quiet: it hides warnings from --strict, too.
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict
"$venv/bin/python" scripts/check_site.py build/site
echo "== tests"
"$venv/bin/python" -m pytest -n "$cores" --quiet -m "not slow" "$@"
