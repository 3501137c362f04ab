#!/bin/sh
# Back up the database to a new file in a directory, named after the time, and keep the last 14 files.
# Run it in the directory of taskd's .env: backup.sh DIRECTORY
set -eu
umask 077
code=$(dirname "$0")/..
"${PYTHON:-$code/.venv/bin/python}" "$code/taskctl.py" backup "$1/taskd-$(date -u +%Y-%m-%dT%H%M%SZ).db"
# Only after a successful backup (set -e), so that failures never delete good backups.
find "$1" -maxdepth 1 -name 'taskd-????-??-??T??????Z.db' | sort | head -n -14 | while read -r old; do rm -- "$old"; done
