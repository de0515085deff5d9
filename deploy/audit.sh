#!/usr/bin/env bash
# Whether a pinned dependency has a known vulnerability: pip-audit on constraints.txt. Without its database it is skipped.
# What is listed in deploy/audit.ignore, an id and the reason a line, does not count.
# A mirror may have packages and no vulnerabilities, which pip-audit takes for none: it is asked for one that is known first.
set -uo pipefail
cd "$(dirname "$0")/.."
audit=${PIP_AUDIT:-}
if [ -z "$audit" ]; then
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    # In an environment of its own: it is no dependency of ours.
    if ! { python3 -m venv "$place" && "$place/bin/pip" install --quiet --timeout 10 --retries 1 pip-audit==2.10.1; } >/dev/null 2>&1; then
        echo "pip-audit: skipped, it cannot be installed here"
        exit 0
    fi
    audit="$place/bin/pip-audit"
fi
ignored=()
while read -r id reason; do
    case $id in "" | "#"*) continue ;; esac
    [ -n "$reason" ] || { echo "pip-audit: $id in deploy/audit.ignore has no reason" >&2; exit 2; }
    ignored+=(--ignore-vuln "$id")
done < <(cat "${AUDIT_IGNORE:-deploy/audit.ignore}"; echo)
audit() {
    timeout 300 "$audit" --no-deps --disable-pip --progress-spinner off "$@" 2>&1
}
said=$(audit --requirement <(echo jinja2==2.4.1))
code=$?
if [ "$code" = 2 ]; then
    echo "$said"
    exit 2
elif ! grep -qE "^Found [0-9]+ known vulnerabilit" <<<"$said"; then
    echo "pip-audit: skipped, no database of vulnerabilities is reached from here: $(tail -n 1 <<<"$said")"
    exit 0
fi
audit --requirement constraints.txt ${ignored[@]+"${ignored[@]}"}
