#!/usr/bin/env bash
# Sets up what the workbook needs and hands over to python -m tgazsr_utils; see --help.
set -euo pipefail

# The pair the workbook is tested with; see install_torch for which build of it.
TORCH=(torch==2.13.0 torchvision==0.28.0)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here"

installed_in() { # does this Python have the workbook, from this very folder?
    "$1" -c 'import importlib.util as u, pathlib, sys
spec = u.find_spec("tgazsr_utils")
sys.exit(not (spec and spec.origin and pathlib.Path(spec.origin).resolve().parents[1] == pathlib.Path(sys.argv[1]).resolve()
              and all(u.find_spec(name) for name in sys.argv[2:])))' "$here" "${@:2}" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 was found" >&2
    return 1
}

torch_of() { # $1: auto, which looks at the driver, or cpu; where PyTorch's own index is out of reach this ends within seconds
    { [[ $(uname) == Linux ]] && .venv/bin/python -m pip install --quiet uv &&
        .venv/bin/python -m uv pip install --quiet --python .venv/bin/python --torch-backend "$@"; } 2>/dev/null
}

install_torch() {
    local pip=(.venv/bin/python -m pip) pinned=(${locked:+--constraint requirements.lock} "${TORCH[@]}")
    if [[ -n ${TORCH_INDEX:-} ]]; then
        "${pip[@]}" install --quiet --index-url "$TORCH_INDEX" "${pinned[@]}"
    elif "${pip[@]}" install --quiet --no-index "${pinned[@]}" 2>/dev/null; then
        return # it is there
    elif torch_of auto "${pinned[@]}"; then
        return
    elif command -v nvidia-smi >/dev/null && torch_of cpu "${pinned[@]}"; then
        echo "  there is no build of ${TORCH[0]} for this GPU's driver: the CPU's; a newer driver, or TORCH_INDEX=URL" >&2
    else
        echo "  its own index is out of reach: the package index's build, which may be that for CUDA (several GB)" >&2
        "${pip[@]}" install --quiet "${pinned[@]}"
    fi
}

set_up() { # $1: what to install beyond the workbook itself, "" or "[test]"
    local python stamp wanted
    stamp=.venv/.installed
    wanted="$(cat pyproject.toml ${locked:+requirements.lock} | cksum) ${TORCH[*]} $here"
    if [[ -f $stamp && "$(head -n 1 "$stamp")" == "$wanted" ]] && { [[ -z $1 ]] || grep -qxF -- "$1" "$stamp"; }; then
        return
    fi
    echo "setting up .venv (once; a few minutes)" >&2
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none there, or one that was killed while it was made
        python=$(find_python)
        "$python" -m venv .venv
    fi
    if [[ -z ${TORCH_INDEX:-} ]] && command -v nvidia-smi >/dev/null; then
        echo "  PyTorch, as there is a GPU for CUDA (several GB) ..." >&2
    else
        echo "  PyTorch ..." >&2
    fi
    install_torch
    echo "  the other packages ..." >&2
    .venv/bin/python -m pip install --quiet ${locked:+--constraint requirements.lock} --editable ".$1"
    printf '%s\n%s\n' "$wanted" "$1" >"$stamp"
}

pick_python() { # $1: extra, $2...: modules that the extra brings; sets $python
    local extra=$1
    shift
    if [[ -z $locked && -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]] && installed_in python "$@"; then
        python=python
    else
        set_up "$extra"
        python=.venv/bin/python
    fi
}

extra="" modules=papermill locked="" rest=()
for argument in "$@"; do
    case $argument in
    --help | -h)
        sed -n '1s/^"""//; /^"""$/q; p' tgazsr_utils/commands.py
        exit 0
        ;;
    --locked) locked=yes ;;
    --test) extra="[test]" modules="papermill pytest" rest+=("$argument") ;;
    --demo) extra="[demo]" modules="papermill onnx onnxscript" rest+=("$argument") ;;
    *) rest+=("$argument") ;;
    esac
done
# shellcheck disable=SC2086 # modules are words
pick_python "$extra" $modules
exec "$python" -m tgazsr_utils ${rest[@]+"${rest[@]}"} # an empty array is unknown to old shells
