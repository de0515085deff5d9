#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions that pyproject.toml admits, with the torch of the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:?usage: deploy/constraints.sh TORCH_VERSION, for example 2.13.0}
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
python3 -m venv "$fresh"
"$fresh/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$torch" -e '.[dev]'
{
    echo "# Written by deploy/constraints.sh $torch: the versions that \`make\` and CI install. Users get ranges."
    # A build tag (+cpu) names where a wheel came from, not what it is.
    "$fresh/bin/python" -m pip freeze --exclude-editable | sed -E 's/ @ file:.*//; s/\+[a-z0-9.]+$//'
} >constraints.txt
