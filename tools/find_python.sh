#!/bin/sh
# Prints a Python that can make this project's .venv ($PYTHON, if set, and no other); else says what is missing.
found=
for py in ${PYTHON:+"$PYTHON"} $([ -n "$PYTHON" ] || echo python3.11 python3.12 python3.13 python3.14 python3 python); do
    version=$("$py" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    if ! "$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then found="$found $py is $version;"
    elif ! "$py" -c 'import ensurepip, venv' 2>/dev/null; then
        found="$found $py is $version, but without venv (on Debian or Ubuntu: apt install python${version%.*}-venv);"
    else echo "$py"; exit 0
    fi
done
echo "cxr_nbdev needs Python 3.11 or newer. Found:${found:- no ${PYTHON:-Python at all};}" >&2
echo "Install one (python.org, or your system's python3.11 and python3.11-venv), or name it: make PYTHON=/path/to/python3.11" >&2
exit 1
