# Sourced by scripts/run and scripts/test: makes the private environment once, then finds it ready.
#
#   realm_environment ROOT EXTRAS     e.g. "" or "[test]"; sets $venv
#
# REALM_VENV    where the environment lives (default: .venv in the repository)
# REALM_PYTHON  the Python to make it with (default: the first of python3, python3.13, 3.12, 3.11 that fits)
#
# pip runs with the user's own index settings. The stamp is written last, so an interrupted installation is
# taken up again; it names everything the installation depends on, so a changed pyproject.toml is installed.

realm_fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Is $1 a Python 3.11 to 3.13 that can make virtual environments? Prints why not.
realm_python_problem() {
    "$1" -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import venv, ensurepip
    except ImportError as error:
        print("lacks the module %s (on Debian and Ubuntu: apt install python%d.%d-venv)" % ((error.name,) + sys.version_info[:2]))
' 2>/dev/null || echo "does not run"
}

realm_find_python() {
    seen=""
    if [ -n "${REALM_PYTHON:-}" ]; then
        set -- "$REALM_PYTHON"
    else
        set -- python3 python3.13 python3.12 python3.11 python
    fi
    for candidate in "$@"; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        problem=$(realm_python_problem "$path")
        if [ -z "$problem" ]; then
            python=$path
            return 0
        fi
        seen="$seen; $path $problem"
    done
    realm_fail "Python 3.11, 3.12 or 3.13 with the venv module is needed, and none was found${seen}; REALM_PYTHON names one"
}

# One installer at a time: a folder is the lock, the process id inside tells a dead owner's from a living one's.
realm_lock() {
    lock="$venv-lock"
    waited=""
    mkdir -p "$(dirname "$venv")" || realm_fail "cannot make the folder of $venv; set REALM_VENV to a place you can write"
    while ! mkdir "$lock" 2>/dev/null; do
        [ -d "$lock" ] || realm_fail "cannot write to $(dirname "$venv"); set REALM_VENV to a place you can write"
        owner=$(cat "$lock/pid" 2>/dev/null || true)
        if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
            rm -rf "$lock"
            continue
        fi
        # An owner killed between mkdir and the pid file leaves an empty lock: give it ten seconds.
        if [ -z "$owner" ] && [ "${#waited}" -ge 10 ]; then
            rm -rf "$lock"
            continue
        fi
        [ -n "$waited" ] || echo "realm: waiting for another installation (process ${owner:-unknown})" >&2
        waited="$waited."
        sleep 1
    done
    echo $$ >"$lock/pid"
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

realm_unlock() {
    rm -rf "$lock"
    trap - EXIT INT TERM HUP
}

# Makes $venv anew. Only what this script made (its marker says so) or an empty folder is ever replaced.
realm_make_venv() {
    if [ -f "$venv/.realm-venv" ]; then
        rm -rf "$venv-old"
        mv "$venv" "$venv-old" # a rename first: an interrupted removal must not look like somebody's own folder
        rm -rf "$venv-old"
    elif [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
        realm_fail "$venv exists and is not an environment that can be used; move it away or set REALM_VENV to another folder"
    fi
    realm_find_python
    echo "realm: making a private environment in $venv with $("$python" --version)" >&2
    mkdir -p "$venv" && : >"$venv/.realm-venv" || realm_fail "cannot write to $venv; set REALM_VENV to a place you can write"
    if ! problem=$("$python" -m venv "$venv" 2>&1); then
        realm_fail "$python -m venv failed: $(printf '%s' "$problem" | tr '\n' ' ')"
    fi
    : >"$venv/.realm-made"
}

realm_environment() {
    root=$1
    extras=$2
    venv=${REALM_VENV:-$root/.venv}
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    unset PYTHONHOME PYTHONPATH # the environment is private
    kind=$(printf '%s' "${extras:-run}" | tr -cd 'a-z')
    # What the installation is made of: the project's description, and the sources of the native kernels.
    wanted="$(cd "$root" && cat pyproject.toml setup.py pallas_kernels/native/*.[ch]* pallas_kernels/*/native/*.[ch]* | cksum) $root"
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.realm-for-$kind" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    realm_lock
    if [ ! -x "$venv/bin/python" ] || { [ -f "$venv/.realm-venv" ] && [ ! -f "$venv/.realm-made" ]; }; then
        realm_make_venv
    fi
    if [ "$(cat "$venv/.realm-for-$kind" 2>/dev/null)" != "$wanted" ]; then # else the one waited for did it
        echo "realm: installing what it needs (once; this can take a few minutes)" >&2
        quiet=--quiet
        [ ! -t 2 ] || quiet=
        # PIP_USER is for installations outside an environment; inside, pip refuses it.
        if ! PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check $quiet -e "$root$extras" >&2; then
            realm_fail "pip could not install what Realm needs (its own messages are above); run the command again to go on"
        fi
        printf '%s\n' "$wanted" >"$venv/.realm-for-run" # every kind includes what running needs
        printf '%s\n' "$wanted" >"$venv/.realm-for-$kind"
    fi
    realm_unlock
}
