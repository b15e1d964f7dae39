#!/bin/sh
# step.sh NAME COMMAND...  runs one step of `make test`: prints NAME before each line of its output and records its time
# step.sh --start          forgets the steps of the previous run
# step.sh --table NAME...  prints the recorded steps and the names of those that did not run, then the last lines of the
#                          output of each step that did not pass
#
# The records are in $STEP_RECORDS (default bin/steps), one file for each step: start, seconds, CPU seconds, result,
# name. The CPU seconds include all programs that the step started and waited for.
set -eu
steps=${STEP_RECORDS:-bin/steps}

case $1 in
--start)
	rm -rf "$steps"
	mkdir -p "$steps"
	date +%s >"$steps/.start"
	;;
--table)
	shift
	echo
	printf '%-16s %8s %8s %8s  %s\n' step "start s" "time s" "CPU s" result
	begin=$(cat "$steps/.start")
	sort -n "$steps"/* | awk -v begin="$begin" -v now="$(date +%s)" '
		{ printf "%-16s %8d %8d %8d  %s\n", $5, $1 - begin, $2, $3, $4; cpu += $3 }
		END { printf "%-16s %8d %8d %8d\n", "all", 0, now - begin, cpu }'
	for name in "$@"; do
		[ -e "$steps/$name" ] || printf '%-16s %35s\n' "$name" "not run"
	done
	for record in "$steps"/*; do
		grep -q ' passed ' "$record" || tail -n 12 "$steps/.output-${record##*/}" | cut -c 1-600
	done
	;;
*)
	name=$1
	shift
	record=$steps/$name
	mkdir -p "$steps"
	start=$(date +%s)
	echo "$start 0 0 unfinished $name" >"$record"
	# times counts the children of the shell that calls it: here those of the left side of the pipe.
	{
		result=passed
		"$@" 2>&1 || result=failed
		times >"$steps/.cpu-$name"
		cpu=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, "[ms]"); sum += t[1] * 60 + t[2] } print int(sum + 0.5) }' "$steps/.cpu-$name")
		echo "$start $(($(date +%s) - start)) $cpu $result $name" >"$record"
	} | sed -u "s/^/$name | /" | tee "$steps/.output-$name"
	grep -q ' passed ' "$record"
	;;
esac
