# Sourced by demo.sh and test.sh: makes .venv and installs the project into it, once per change of pyproject.toml.
# usage: source scripts/setup.sh [EXTRA]        (an extra of pyproject.toml: test or dev)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed (found: $(python3 --version 2>&1))." >&2
    exit 1
}

# The CPU build of torch is a tenth of the size of the CUDA build. Where pip's index has it, pip takes it; else uv,
# which knows where torch keeps its CPU builds; else the build that pip finds.
install_torch() {
    if .venv/bin/python -c 'import torch' 2>/dev/null; then
        return
    fi
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        .venv/bin/pip install --quiet "torch>=2.5"
        return
    fi
    .venv/bin/pip install --quiet "torch==2.13.0+cpu" 2>/dev/null && return
    { .venv/bin/pip install --quiet uv &&
        .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu "torch>=2.5"; } 2>/dev/null && return
    echo "no CPU build of torch was found; installing the default one"
    .venv/bin/pip install --quiet "torch>=2.5"
}

# The report is tested in a browser. Without one these tests are skipped.
install_browser() {
    if command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$(id -u)" != 0 ]; then
        return
    fi
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "Chromium could not be installed; the report is not tested in a browser"
}

install() {
    local extra=${1:-} stamp
    stamp=.venv/.installed-${extra:-base}-$(sha256sum pyproject.toml | cut -c1-16)
    if [ -e "$stamp" ]; then
        return
    fi
    echo "installing into .venv (once)"
    if [ ! -x .venv/bin/pip ]; then
        "$(find_python)" -m venv .venv || { echo "error: python -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
    fi
    install_torch
    .venv/bin/pip install --quiet --editable ".${extra:+[$extra]}"
    touch "$stamp"
}

export PIP_DISABLE_PIP_VERSION_CHECK=1
install "${1:-}"
.venv/bin/python -m compileall -q nnunet_lite # or each start does, where PYTHONDONTWRITEBYTECODE is set
if [ -n "${1:-}" ]; then
    install_browser
fi
export PATH="$PWD/.venv/bin:$PATH"
