#!/usr/bin/env bash
# Asks a service for known vulnerabilities of what scripts/quickstart.sh installs: bash scripts/audit.sh [arguments]
#
# Arguments go to pip-audit, such as --vulnerability-service osv. It is installed into .venv-audit. Exit code 1 if there are
# vulnerabilities, or if a package could not be looked up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-audit
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.10,<3"

torch="$(mktemp)"
trap 'rm -f "$torch"' EXIT
grep -o 'torch==[0-9.]*' scripts/quickstart.sh >"$torch"

# Strict, for without it a package that the service does not know counts as one that is safe.
audit=("$venv/bin/pip-audit" --strict --no-deps --disable-pip)
"${audit[@]}" --requirement scripts/quickstart-lock.txt "$@"
"${audit[@]}" --requirement "$torch" "$@"
