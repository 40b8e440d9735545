#!/usr/bin/env bash
# timed.sh NAME COMMAND...: runs the command and prints its name and time.
set -euo pipefail
name=$1 begin=$EPOCHREALTIME
shift
printf '== %s\n' "$name"
status=0
"$@" || status=$?
tenths=$(((${EPOCHREALTIME/./} - ${begin/./}) / 100000))
printf '== %s: %s in %d.%d s\n' "$name" "$([[ $status == 0 ]] && echo done || echo "failed with status $status")" \
    $((tenths / 10)) $((tenths % 10))
exit "$status"
