#!/usr/bin/env bash
# Mutation testing (mutmut) of what must not be wrong: which changes of the code no test notices. It takes a second or two a
# change, so an hour or more; it may be stopped, and goes on where it was.
# usage: mutants.sh fits|codec [PATTERN, of names as `ops_studies.approach2.*`]; the result is at the end, and by
# `(cd build/mutants/fits && ../venv/bin/python -m mutmut browse)`.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?fits or codec} directory=$PWD/build/mutants/$1
case $part in
    fits) code='"ops_studies/fits.py", "ops_studies/approach2.py", "ops_studies/approach3.py", "ops_studies/estimates.py"' tests='"tests/unit/test_fits.py"' ;;
    codec) code='"relight/training/codec.py"' tests='"tests/unit/test_codec.py"' ;;
    *) echo "mutants: there is no part $part: fits or codec" >&2; exit 2 ;;
esac
python=$PWD/build/mutants/venv/bin/python
if [ ! -x "$python" ]; then
    # mutmut alone: all else, pytest too, is that of .venv.
    .venv/bin/python -m venv build/mutants/venv
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
    rm -rf "$site"/{pytest,_pytest,pluggy,click,rich,yaml,_yaml}{,-*.dist-info}
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/ours.pth"
fi
# A module's name has to be its path: the packages lie beside each other.
mkdir -p "$directory"
cp -r contract/ops_contract studies/ops_studies sdk/relight backend/ops_backend worker/ops_worker tests migrations "$directory"
cat >"$directory/pyproject.toml" <<EOF
[tool.mutmut]
source_paths = ["relight", "ops_contract", "ops_studies", "ops_backend", "ops_worker"]
only_mutate = [$code]
also_copy = ["migrations"]
mutate_only_covered_lines = true
timeout_constant = 20.0
use_git_change_detection = false
pytest_add_cli_args = ["-m", "not slow", "-p", "no:cacheprovider", "-x", "-q"]
pytest_add_cli_args_test_selection = [$tests]

[tool.pytest.ini_options]
pythonpath = ["tests", "."]
asyncio_mode = "auto"
addopts = "-p no:schemathesis"
markers = ["gpu: needs a GPU", "slow: takes long"]
EOF
cd "$directory"
OMP_NUM_THREADS=1 "$python" -m mutmut run --max-children 1 "${@:2}" >output.log 2>&1 || { tail -c 2000 output.log; exit 1; }
tr '\r' '\n' <output.log | tail -n 1
"$python" -m mutmut results | grep -v 'not checked' || echo "every change was noticed"
