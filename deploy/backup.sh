#!/bin/sh
# Back up the database to a new file in a directory, named after the time, and delete old backups:
# those of the last hour stay, the last one of each hour of a day, and the last one of each of 14 days.
# Run it in the directory of taskd's .env: backup.sh DIRECTORY
set -eu
umask 077
code=$(dirname "$0")/..
now=$(date +%s)
named() { date -u -d "@$1" +%Y-%m-%dT%H%M%SZ; }
# What a backup leaves behind that was killed or lost power; none takes an hour.
find "$1" -maxdepth 1 -type d -name '.taskd-????-??-??T??????Z.db.*' -mmin +60 -exec rm -r -- {} +
"${PYTHON:-$code/.venv/bin/python}" "$code/taskctl.py" backup "$1/taskd-$(named "$now").db"
# Only after a successful backup (set -e), so that failures never delete good backups.
find "$1" -maxdepth 1 -name 'taskd-????-??-??T??????Z.db' | sort -r |
    awk -v hour="$(named $((now - 3600)))" -v day="$(named $((now - 86400)))" '{
        time = substr($0, length($0) - 20)
        last_of_hour = !seen[substr(time, 1, 13)]++
        last_of_day = !seen[substr(time, 1, 10)]++
        days += last_of_day
        if (time < hour && !(time > day && last_of_hour) && !(last_of_day && days <= 14)) print
    }' | xargs -r -d '\n' rm --
