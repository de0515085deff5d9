#!/usr/bin/env bash
# Whether a pinned dependency has a known vulnerability: pip-audit on constraints.txt. Without its database it is skipped.
# What is listed in deploy/audit.ignore, an id and the reason a line, does not count.
set -uo pipefail
cd "$(dirname "$0")/.."
audit=${PIP_AUDIT:-}
if [ -z "$audit" ]; then
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    # In an environment of its own: it is no dependency of ours.
    if ! { python3 -m venv "$place" && "$place/bin/pip" install --quiet --disable-pip-version-check pip-audit; } >/dev/null 2>&1; then
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
said=$(timeout 300 "$audit" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
    ${ignored[@]+"${ignored[@]}"} 2>&1)
code=$?
unknown=$(grep -c "could not be audited" <<<"$said")
if [ "$code" = 0 ] && [ "$unknown" -ge "$(grep -c == constraints.txt)" ]; then
    echo "pip-audit: skipped, the index that is reached here knows of no vulnerabilities"
elif [ "$code" = 0 ] || grep -q "known vulnerabilit" <<<"$said"; then
    echo "$said"
    exit "$code"
elif [ "$code" = 124 ] || grep -qE "ConnectionError|onnection (refused|reset|aborted)|[Tt]imed out|resol(ve|ution)|ServiceError" <<<"$said"; then
    echo "pip-audit: skipped, its database cannot be reached: $(tail -n 1 <<<"$said")"
else
    echo "$said"
    exit "$code"
fi
