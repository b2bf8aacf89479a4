#!/usr/bin/env bash
# Trains a small real model with SimPO on this machine, from nothing to a table of results.
#   deploy/quickstart/run.sh [--keep]     --keep: the coordinator stays up at the end, until Ctrl-C
# `make quickstart` installs, builds and calls this.
exec /usr/bin/python3 "$(dirname "$0")/quickstart.py" "$@"
