#!/usr/bin/env bash
# docs/quickstart.md on a service that runs. usage: quickstart.sh BIN DIRECTORY; OPS_API_URL, OPS_API_TOKEN say where.
url=$OPS_API_URL token=$OPS_API_TOKEN
. "$(dirname "$0")/journey.sh"
export OPS_API_URL=$url OPS_API_TOKEN=$token
# Long enough to be stopped by hand is long for a test.
fill() { sed -E "s/\b3b9b\b/$id/g; s/--max-epochs 200/--max-epochs 60/; s#\\\$PWD/.venv/bin#$bin#"; }

page "$repository/docs/quickstart.md"
next_block
id=$(said_id)
until_true 60 saved 1
next_block
next_block
until_true 60 is cancelled
next_block
grep -q 'goes on from epoch' "$root/said" || fail "ops resume does not say where it goes on"
is completed || fail "it is not completed"
next_block
next_block
[ -s val_loss.png ] || fail "nothing was drawn"
[ -s out/model.safetensors ] || fail "there is no model"
no_block_is_left
