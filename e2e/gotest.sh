#!/bin/sh
# gotest.sh GO FOLDER ARGS...  runs `GO test ARGS...` in FOLDER. It fails if a test fails or is skipped, or if a package has
# no test to run: a test that does not run has shown nothing. It prints failures, the tests' own output, the slowest tests, and again the messages of
# each failed test, on one line each: CI shows only the end of its output.
#
# -count=1: the tests depend on charts, programs and the kernel, and Go's cache of test results does not notice when
# those change. -vet=off: `make lint` runs vet.
set -u
go=$1 folder=$2
shift 2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ "$go" -C "$folder" test -v -count=1 -vet=off "$@" 2>&1; echo "exit status $?"; } | tee "$log" | grep --line-buffered -vE '^ *(=== |--- PASS)'
sed -nE 's/^ *--- PASS: (.*) \(([0-9]{2,}\.[0-9]+)s\)$/\2 s  \1/p' "$log" | sort -rn | head -8
if grep -qE -- '--- SKIP: |^ok .*\[no tests to run\]$' "$log"; then
	echo "tests were skipped, or a package had none to run:" >&2
	grep -E -- '--- SKIP: |^ok .*\[no tests to run\]$' "$log" >&2
	exit 1
fi
[ "$(tail -n 1 "$log")" = "exit status 0" ] && exit
# Subtests are indented. A test that failed only because of a subtest has no message of its own. What a test writes with
# t.Output, such as the state of its namespace, has no file name and is no message.
awk '
	/^ *=== (RUN|CONT|NAME) / { test = $3; next }
	/^ *--- FAIL: / { if (message[$3] != "") print "FAILED " $3 ": " message[$3]; next }
	/^ +[^ ]+\.go:[0-9]+: / { sub(/^ +/, ""); message[test] = message[test] (message[test] == "" ? "" : " | ") substr($0, 1, 200) }
	/^panic: |\.go:[0-9]+:[0-9]+: |DATA RACE/ { print }' "$log"
exit 1
