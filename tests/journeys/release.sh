#!/usr/bin/env bash
# What is released: the sdist, the wheel made of it, and the service from that wheel, in an environment that has nothing
# but the torch of its user. usage: release.sh BIN DIRECTORY
. "$(dirname "$0")/journey.sh"
install() { # ENVIRONMENT what…
    "$root/$1/bin/python" -m pip install --quiet --disable-pip-version-check -c "$repository/constraints.txt" "${@:2}"
}
torch_of() { find "$root/theirs/lib" -path '*/site-packages/torch/*' -newer "$root/torch_is_there" -print -quit; }

python -m venv "$root/makes"
"$root/makes/bin/python" -m pip install --quiet --disable-pip-version-check build
"$root/makes/bin/python" -m build --outdir "$root/dist" "$repository"
wheel=$(echo "$root"/dist/relight-*.whl)
[ -s "$wheel" ] && [ -s "$root"/dist/relight-*.tar.gz ] || fail "there is no wheel, or no sdist"

python -m venv "$root/theirs"
install theirs torch
touch "$root/torch_is_there"
sleep 1
install theirs "$wheel[backend,worker]"
[ -z "$(torch_of)" ] || fail "the torch that was there was touched: $(torch_of)"
PATH=$root/theirs/bin:$PATH
[[ $(python -c 'import ops_backend; print(ops_backend.__file__)') = "$root/theirs/"* ]] || fail "not what was installed"
[[ "$wheel" = */relight-"$(ops --version)"-* ]] || fail "ops --version says $(ops --version)"

serve ops up
ops train digits --max-epochs 40 >"$root/said"
id=$(said_id)
until_true 120 saved 1
ops cancel "$id"
until_true 60 is cancelled
ops resume "$id"
ops watch "$id"
is completed || fail "it is not completed"
ops download "$id" --to out
[ -s out/model.safetensors ] || fail "there is no model"
"$bin/python" "$repository/tests/journeys/see_curve.py" "$(ops dashboard)" "$(ops status "$id" --json | of 'it["id"]')" "$root/curve.png"
echo "What is released runs."
