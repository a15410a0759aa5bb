#!/bin/sh
# Forward the arguments to convert.py; exec, so that signals and the exit code pass through.
# The kernel drops a signal to a container's first process while nobody handles it: until this shell is replaced it
# does, and then the signal waits, blocked, until convert.py does.
trap 'exit 130' INT
trap 'exit 143' TERM
folder=$(dirname "$0")
exec env --block-signal=HUP,INT,TERM python "$folder/convert.py" "$@"
