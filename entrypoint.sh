#!/bin/sh
# Forward the arguments to convert.py; exec, so that signals and the exit code pass through.
exec python "$(dirname "$0")/convert.py" "$@"
