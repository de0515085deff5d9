#!/usr/bin/env bash
# Mutation testing (mutmut) of what must not be wrong: which changes of the code no test notices (decision 56). With two
# jobs codec takes six minutes, fits seven; of the ledger a sample of three hundred takes six, of the store one of a hundred
# a quarter of an hour. It may be stopped, and goes on where it was.
# usage: mutants.sh codec|fits|ledger|store [--sample N] [--jobs N] [PATTERN, of names as `ops_studies.approach2.*`]; one of them
# is shown by `(cd build/mutants/PART && ../venv/bin/python -m mutmut show NAME)`.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?codec, fits, ledger or store} directory=$PWD/build/mutants/$1
case $part in
    codec) code=relight/training/codec.py tests=tests/unit/test_codec.py ;;
    fits) code=$(echo ops_studies/{fits,approach2,approach3,estimates}.py) tests="tests/unit/test_fits.py tests/unit/test_study_reduction.py" ;;
    ledger)
        code=$(echo ops_backend/store/{energy,ledger,ledger_views}.py ops_worker/energy/booking.py)
        tests="tests/unit/test_energy_booking.py tests/unit/test_ledger.py $(echo tests/integration/test_{store_,}energy.py)" ;;
    store)
        code=$(echo ops_backend/store/{transitions,reports,claims,submit,retention,placement,lineage}.py)
        tests=$(echo tests/integration/test_{store_{transitions,claims,commands,fork,gangs,output,replay,studies},retention,api,dry_run,engine_jobs,validation}.py) ;;
    *) echo "mutants: there is no part $part: codec, fits, ledger or store" >&2; exit 2 ;;
esac
quoted() { printf '"%s", ' $1; }
python=$PWD/build/mutants/venv/bin/python driver=$PWD/deploy/mutants.py
if [ ! -x "$python" ]; then
    # mutmut alone: all else, pytest too, is that of .venv.
    .venv/bin/python -m venv build/mutants/venv
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
    rm -rf "$site"/{pytest,_pytest,pluggy,click,rich,yaml,_yaml}{,-*.dist-info}
    .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/ours.pth"
fi
if [[ $tests == *integration* ]]; then
    # It would be most of the time, were it started for every change. It ends with us: its stdin does.
    coproc PYTHONPATH=tests .venv/bin/python -m helpers.kept_postgres
    read -r RELIGHT_TEST_DATABASES <&"${COPROC[0]}"
    export RELIGHT_TEST_DATABASES
fi
# A module's name has to be its path: the packages lie beside each other.
mkdir -p "$directory"
cp -ru contract/ops_contract studies/ops_studies sdk/relight backend/ops_backend worker/ops_worker cli/ops_cli tests migrations "$directory"
cat >"$directory/pyproject.toml" <<EOT
[tool.mutmut]
source_paths = ["relight", "ops_contract", "ops_studies", "ops_backend", "ops_worker", "ops_cli"]
only_mutate = [$(quoted "$code")]
also_copy = ["migrations"]
timeout_constant = 5.0
timeout_multiplier = 5.0
use_git_change_detection = false
pytest_add_cli_args = ["-m", "not slow", "-p", "no:cacheprovider", "-x", "-q"]
pytest_add_cli_args_test_selection = [$(quoted "$tests")]

[tool.pytest.ini_options]
pythonpath = ["tests", "."]
asyncio_mode = "auto"
addopts = "-p no:schemathesis"
markers = ["gpu: needs a GPU", "slow: takes long"]
EOT
cd "$directory"
rm -f mutants/mutmut-stats.json  # which tests reach a function: there may be new ones
OMP_NUM_THREADS=1 "$python" "$driver" "${@:2}" >output.log 2>&1 || { tail -c 2000 output.log; exit 1; }
tr '\r' '\n' <output.log | sed -n '/ changes, by seed /p; /^\(ops_\|relight\)[^ ]*: /p; /^tried /p'
