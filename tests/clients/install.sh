#!/bin/sh
# Install outsiders' clients into environments of their own at the repository root: .venv-clients (Python 3.11 or newer) and
# .venv-harbor (Python 3.12 or newer; where there is none, this says so and goes on without). Does nothing when the pins have
# not changed since the last complete install. PYTHON and PYTHON312 choose the interpreters. `--has-python-312` installs
# nothing and tells by its exit code whether Harbor's could be.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)

# Whether $1 runs and is at least Python 3.$2 (a version manager's stand-in for a version that is not chosen does not run).
is_python() {
    "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" >/dev/null 2>&1
}

python312() {
    for candidate in ${PYTHON312:-} "${PYTHON:-python3}" python3.12 python3.13 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13.*/bin/python; do
        if is_python "$candidate" 12; then
            echo "$candidate"
            return
        fi
    done
}

# is_installed NAME
is_installed() {
    cmp -s "$root/.venv-$1/.installed" "$here/requirements-$1.txt"
}

# install NAME INTERPRETER
install() {
    venv=$root/.venv-$1
    pins=$here/requirements-$1.txt
    echo "installing tests/clients/requirements-$1.txt into $venv"
    test -x "$venv/bin/python" || "$2" -m venv "$venv"
    # --no-deps: the pins are complete (their first lines say what they leave out); bytecode is made as it is needed.
    "$venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps --no-compile -r "$pins"
    cp "$pins" "$venv/.installed"
}

if [ "${1:-}" = --has-python-312 ]; then
    test -n "$(python312)"
    exit
fi
is_installed clients || install clients "${PYTHON:-python3}"
is_installed harbor && exit 0
newer=$(python312)
if [ -n "$newer" ]; then
    install harbor "$newer"
else
    echo "no Python 3.12 or newer here: Harbor's client is not installed, and its tests will be skipped" >&2
fi
