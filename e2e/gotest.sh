#!/bin/sh
# gotest.sh GO FOLDER ARGS...: runs `GO test ARGS...` in FOLDER and fails if a test fails or is skipped. A test that
# cannot run here has shown nothing, so it must not look as if it had; nor may one whose result is from a cache (-count):
# chart, programs and kernel are not among what Go looks at to tell whether something has changed.
set -u
go=$1 folder=$2
shift 2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ "$go" -C "$folder" test -v -count=1 "$@" 2>&1; echo "exit status $?"; } | tee "$log" | grep --line-buffered -vE '^ *(=== |--- PASS)'
# Where the time went.
sed -nE 's/^ *--- PASS: (.*) \(([0-9]{2,}\.[0-9]+)s\)$/\2 s  \1/p' "$log" | sort -rn | head -8
if grep -q '^ *--- SKIP' "$log"; then
	echo "tests were skipped:" >&2
	grep '^ *--- SKIP' "$log" >&2
	exit 1
fi
grep -q '^exit status 0$' "$log"
