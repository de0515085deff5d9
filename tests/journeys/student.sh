#!/usr/bin/env bash
# A student's first afternoon: the commands of docs/tutorial.md.
. "$(dirname "$0")/journey.sh"
pid=
fill() { sed -E "s/\bPID\b/$pid/g; s/\bID\b/$id/g"; }
every_value() { for name in loss accuracy learning_rate epoch; do ops metrics "$1" "$name" --json | of 'it[0]["points"]'; done; }

page "$repository/docs/tutorial.md"
number=1
serve $(cat "$root/blocks/1.sh")
next_file train.py
cp train.py as_written.py
[ "$(wc -l <train.py)" -le 65 ] || fail "train.py has more than some 60 lines"
next_block
id=$(said_id)
until_true 120 saved 1
next_block
pid=$(ops attempts "$id" --json | of 'it[-1]["trainer_pid"]')
next_block
echo "raise SystemExit('this is not what was sent')" >train.py
until_true 60 saved 2
next_block
grep -q 'attempt 2 began' "$root/said" || fail "ops events does not tell of the second attempt"
next_block
until_true 60 is cancelled
next_block
is completed || fail "it is not completed"
next_block
[ -s loss.png ] || fail "nothing was drawn"
no_block_is_left

# Beside the tutorial: is it true what it says?
mv as_written.py train.py
undisturbed=$(ops run --json -- python train.py --epochs 200 | of 'it["id"]')
ops watch "$undisturbed"
ops download "$undisturbed" --to undisturbed
[ "$(every_value "$id")" = "$(every_value "$undisturbed")" ] || fail "the curves differ"
cmp out/model.safetensors undisturbed/model.safetensors || fail "the weights differ"
[ "$(ops metrics "$id" loss --json | of 'len(it[0]["points"])')" -eq 9400 ] || fail "some step is missing, or there twice"
python -c "from safetensors.torch import load_file; assert len(load_file('out/model.safetensors')) > 5"
echo "The student went home content."
