#!/usr/bin/env bash
# Makes the virtual environment that every make target runs in: make_environment.sh FOLDER
# $PYTHON chooses the interpreter; otherwise the first one on the path that is new enough and can make environments.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$1

usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "eagleray needs Python 3.11 or newer with its venv module; tried: ${PYTHON:-python3.11 python3 python3.12 python3.13}." >&2
  echo "On Debian and Ubuntu: apt-get install python3.11 python3.11-venv (or python3 python3-venv where python3 is newer)." >&2
  echo "An interpreter elsewhere: make PYTHON=/path/to/python3 ..." >&2
  return 1
}

if ! "$environment/bin/python" -c 'import pip' 2>/dev/null; then
  python=$(find_python)
  echo "Making $environment with $("$python" --version) and installing the tested versions (about 1.5 GB, some minutes)."
  "$python" -m venv --clear "$environment"
fi
"$environment/bin/python" -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,local]'
