#!/usr/bin/env bash
# Create a virtual environment with vggrpo (editable) and its tools, at the tested versions of constraints.txt.
#
# usage: [PYTHON=python3] [TORCH=auto|cpu|cuda] scripts/install.sh VENV
#
# torch comes first and by itself, because its default build on Linux brings several GB of CUDA libraries. With
# TORCH=auto a machine without `nvidia-smi` gets the CPU build: from pip's own sources if they have one, else from
# PyTorch's CPU index, else the default build (which runs on CPUs too; it is only larger).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: scripts/install.sh VENV}
python=${PYTHON:-python3}
choice=${TORCH:-auto}
torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'vggrpo: %s\n' "$*"; }
fail() { printf 'vggrpo: error: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "no $python found; install Python 3.10 or newer, or set PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; set PYTHON to Python 3.10 or newer"

case $choice in auto | cpu | cuda) ;; *) fail "TORCH=$choice is not known; use auto, cpu or cuda" ;; esac
if [ "$choice" = auto ]; then
    choice=cuda
    # macOS has one build for all; only Linux' default build carries CUDA.
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then choice=cpu; fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
    fail "cannot create $venv; on Debian and Ubuntu: apt install python3-venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_torch() {
    "$venv/bin/python" - "$torch" 2>/dev/null <<'PY'
import importlib.metadata, sys
sys.exit(importlib.metadata.version("torch").split("+")[0] != sys.argv[1])
PY
}

install_cpu_torch() {
    pip install -qq -c constraints.txt "torch==$torch+cpu" 2>/dev/null && return
    # --no-deps: that index has few versions of what torch needs; the second step below brings them.
    pip install -qq --no-deps --retries 0 --timeout 20 --index-url "$cpu_index" "torch==$torch+cpu" 2>/dev/null && return
    say "no CPU build of torch $torch found; installing the default build"
    pip install -qq -c constraints.txt "torch==$torch"
}

if ! has_torch; then
    say "installing torch $torch ($choice build) into $venv; a few minutes"
    if [ "$choice" = cpu ]; then install_cpu_torch; else pip install -qq -c constraints.txt "torch==$torch"; fi
fi
if [ "$choice" = cpu ]; then
    say "this is the CPU build of torch; for CUDA: make clean install TORCH=cuda"
fi

say "installing vggrpo and its tools"
pip install -qq -c constraints.txt -e '.[dev]'
say "ready: $venv/bin/vggrpo --help"
