#!/bin/sh
# Install one real engine (`sglang` or `vllm`, for CPUs) into an environment of its own: .venv-NAME at the repository root.
# Does nothing when the pins have not changed since the last complete install. PYTHON chooses the interpreter.
set -eu
name=${1:?name an engine: sglang or vllm}
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
venv=$root/.venv-$name
pins=$here/requirements-$name-cpu.txt
stamp=$venv/.installed

if [ -f "$stamp" ] && cmp -s "$stamp" "$pins"; then
    exit 0
fi
echo "installing $name into $venv (about 700 MB to fetch, 2.7 GB on disk)"
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
# --no-deps: the engines' own dependency lists pull CUDA builds that a CPU cannot use; the pins are complete.
"$venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps -r "$pins"
cp "$pins" "$stamp"
