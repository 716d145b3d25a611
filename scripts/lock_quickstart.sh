#!/usr/bin/env bash
# Writes scripts/quickstart-lock.txt: the version and the hashes of every package that scripts/quickstart.sh installs, for
# every Python and system that has them. For the newest versions: bash scripts/lock_quickstart.sh --upgrade
#
# It needs uv (pip install uv) and a package index. Left out are torch, whose build for the machine is the user's choice, and
# what its builds for CUDA bring: torch itself says which versions of these it takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=scripts/quickstart-lock.txt
torch="$(grep -o 'torch==[0-9.]*' scripts/quickstart.sh)"

uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --generate-hashes --no-annotate \
    --custom-compile-command "bash scripts/lock_quickstart.sh" --output-file "$lock" "$@" \
    --extra recipes pyproject.toml - <<<"$torch"$'\n'"setuptools>=77" >/dev/null

# A requirement begins a line, and its hashes are indented below it.
awk '/^[a-z]/ { keep = !/^(torch|triton|cuda-|nvidia-)/ } /^#/ || keep' "$lock" >"$lock.part"
mv "$lock.part" "$lock"
