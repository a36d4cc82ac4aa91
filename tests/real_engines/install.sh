#!/bin/sh
# Install the real SGLang (CPU, pure-torch fallbacks) into an environment of its own: .venv-sglang at the repository root.
# Does nothing when the pins have not changed since the last complete install. PYTHON chooses the interpreter.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../.." && pwd)
venv=$root/.venv-sglang
pins=$here/requirements-sglang-cpu.txt
stamp=$venv/.installed

if [ -f "$stamp" ] && cmp -s "$stamp" "$pins"; then
    exit 0
fi
echo "installing SGLang into $venv (about 700 MB to fetch, 2.7 GB on disk)"
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
# --no-deps: SGLang's own dependency list pulls CUDA builds that this machine cannot use; the pins are complete.
"$venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps -r "$pins"
cp "$pins" "$stamp"
