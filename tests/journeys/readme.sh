#!/usr/bin/env bash
# A stranger with an empty HOME: the commands of /README.md, but `make test`, from the clone to the curve in a browser.
# usage: readme.sh BIN DIRECTORY; leaves DIRECTORY/curve.png.
. "$(dirname "$0")/journey.sh"
fill() {
    sed -e "s#<this repository>#'$repository'#; s#http://127.0.0.1:8470#${address:-}#; /^make test/d" -e 's/\b1f6e\b/$id/g; s/--max-epochs 200/--max-epochs 80/; s/"max_epochs": 20/"max_epochs": 5/' \
        -e '/^ops train/a id=$(said_id)' -e '/^ops cancel/i until_true 120 saved 1' -e '/^ops resume/i until_true 60 is cancelled'
}
# What `make` would install anew, torch and all, is borrowed: but for Relight itself, which is the clone's.
borrow_environment() {
    local site
    python -m venv --without-pip .venv
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf "$PWD/%s\n" contract studies sdk backend worker cli >"$site/borrowed.pth"
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >>"$site/borrowed.pth"
    sed "1s|.*|#!$PWD/.venv/bin/python|" "$bin/ops" >.venv/bin/ops
    chmod +x .venv/bin/ops
    cat pyproject.toml constraints.txt deploy/setup.sh | cksum >.venv/.installed
    bin=$PWD/.venv/bin PATH=$PWD/.venv/bin:$PATH
}

page "$repository/README.md"
next_block # the clone
borrow_environment
[ "$(python -c 'import ops_cli; print(ops_cli.__file__)')" = "$PWD/cli/ops_cli/__init__.py" ] || fail "not the clone's own code"
next_block # the demo
grep -q 'Curves equal bit for bit: yes' "$root/said" || fail "the demo did not say that the curves are equal"
[ -s demo-out/curves.png ] || fail "the demo drew nothing"
number=$((number + 1))
serve $(cat "$root/blocks/$number.sh")
next_block # use it
grep -q 'goes on from epoch' "$root/said" || fail "ops resume does not say where it goes on"
grep -q 'values equal bit for bit' "$root/said" || fail "the replay found no equal values"
[ -s loss.png ] || fail "nothing was drawn"
[ -s out/model.safetensors ] || fail "there is no model"
link=$(grep -oE 'http://[^ ]+/#login=.+' "$root/said")
next_block # over HTTP
grep -q '"id":' "$root/said" || fail "the API made no operation"
next_file first.py
python first.py | tee "$root/said"
grep -q completed "$root/said" || fail "the client's operation is not completed"
no_block_is_left

python "$repository/tests/journeys/see_curve.py" "$link" "$(ops status "$id" --json | of 'it["id"]')" "$root/curve.png"
echo "The stranger stays."
