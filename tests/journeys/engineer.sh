#!/usr/bin/env bash
# A platform engineer's hour with curl: the commands of docs/rest.md, and what they must have answered.
. "$(dirname "$0")/journey.sh"
port=$(python -c 'from ops_cli.up import free_port; print(free_port())')
fill() { sed "s#http://127.0.0.1:8470#$address#; s#127.0.0.1:8000#127.0.0.1:$port#; s/: 200, \"checkpoint/: 60, \"checkpoint/"; }
says() { grep -q -- "$1" "$root/said" || fail "no $1 in what block $number said"; }
saw() { [ "$(cat "$root/said")" = "$1" ] || fail "block $number did not say $1"; }

page "$repository/docs/rest.md"
serve ops up --workers 2
next_block # the address
says digits
next_block # a submit, twice
saw 200
id=$ID
[ "$(jq -r .id again.json)" = "$ID" ] || fail "the second submit made another operation"
next_block # the resolved job
says '"max_epochs": 60'
until_true 120 saved 1
next_block # a poll of what runs; once it is still, the tag is that of an unchanged one
ops list >/dev/null
next_block # where it ran
says '"world_size":1'
next_block # the list
says "$ID"
next_block # the stream
[ "$(cat "$root/said")" -gt 3 ] || fail "the stream said next to nothing"
next_block # and from where it was
says 'event: progress'
[ -z "$(comm -12 <(grep '^data: {"seq"' stream.txt | sort) <(grep '^data: {"seq"' more.txt | sort))" ] || fail "an event came twice"
next_block # a cancel
says cancelling
until_true 60 is cancelled
body=$(curl -sf -H "$AUTH" $API/operations/$ID -D headers.txt)
etag=$(sed -n 's/^etag: *//Ip' headers.txt | tr -d '\r')
[ "$(curl -s -H "$AUTH" -H "If-None-Match: $etag" $API/operations/$ID -w '%{http_code}')" = 304 ] || fail "unchanged, and no 304"
next_block # a resume
says '"step"'
next_block # a token that only looks
says forbidden
[ "$(curl -s -H "$LOOKS" $API/operations -o /dev/null -w '%{http_code}')" = 401 ] || fail "a revoked token opens"
next_block # what is refused
saw 'not_found
not_resumable
execution.max_epoch: no such field; did you mean max_epochs?
idempotency_conflict
unauthenticated'
[ "$(jq -r .attempt <<<"$body")" = 1 ] || fail "it was the first attempt"
next_block # metrics
says '"loss"'
next_block # output
[ "$(sed -n 's/^relight-log-next: *//Ip' headers.txt | tr -d '\r')" -ge "$(stat -c %s output.txt)" ] || fail "the log's next offset is before its end"
python - "$port" >received.jsonl 2>receiver.log <<'END' &
import http.server, sys


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["content-length"])).decode(), self.headers["webhook-signature"], flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver).serve_forever()
END
receiver=$!
until_true 20 curl -s "http://127.0.0.1:$port"
next_block # a webhook, and a test of it
says 204
grep -q '^whsec_' webhook-secret || fail "no secret"
until_true 180 is completed
until_true 30 grep -q "\"id\":\"$ID\"" received.jsonl
kill $receiver
next_block # its deliveries
says "$ID.delivered.204"
next_block # the model, in two parts
says 'model.safetensors: OK'
python -c "from safetensors.numpy import load_file; assert load_file('model.safetensors')"
next_block # a study, to its end
[ "$(grep -c 'completed' "$root/said")" = 4 ] || fail "not all four children of the study have completed"
says '"n":2'
next_block # the scrape
says 'status="completed"'
no_block_is_left
echo "The engineer has seen enough."
