#!/usr/bin/env bash
# Sets up what the workbook needs and runs it headlessly; see --help.
set -euo pipefail

# The pair the workbook is tested with; see install_torch for which build of it.
TORCH=(torch==2.13.0 torchvision==0.28.0)

usage() {
    cat <<'EOF'
Usage: ./run_all.sh [profile] [notebook numbers...] [-p name value]... [--fresh] [--locked]
       ./run_all.sh compare runs/A runs/B
       ./run_all.sh submit METHOD --by WHO [runs/A]
       ./run_all.sh challenge [FILE...]
       ./run_all.sh --test [--long] [--locked] [pytest arguments...]
       ./run_all.sh --lab [--locked] [JupyterLab's arguments...]

In any order:
  profile           mini (default), or another file of notebooks/profiles
  notebook numbers  such as 01 04: run only these (also those a profile leaves out)
  -p name value     set a parameter of the notebooks; may be repeated
  --fresh           start over, with nothing that is stored; earlier results of the run are moved aside
  compare           print what differs between two runs: parameters, and paired differences of methods
  submit            write the file of a run's method for the challenge (docs/challenge.md) and print its row
  challenge         check such files (default: those of data/challenge) and show them side by side
  --test            set up what the tests need and run them; --long: with every count that README states
  --lab             open the workbook in JupyterLab
  --locked          in .venv, with the very versions of requirements.lock, which the kept results were made with
  --help            show this

PyTorch is taken as built for this machine's driver, or for the CPU where there is no GPU: a CUDA build is several GB,
one for the CPU 0.2. TORCH_INDEX=URL takes it from that package index instead.
Uses the active environment if the workbook is installed there, else .venv, which it makes on the first call.
Results go to runs/<profile>/, or with other parameters to a folder named after them; models and records to runs/store,
for all runs. What is done and unchanged is skipped; an interrupted run goes on where it was.
EOF
}

# Read by PyTorch in whatever is started here: threads that wait and spin make a busy machine ten times slower.
if [[ -z ${OMP_WAIT_POLICY:-}${GOMP_SPINCOUNT:-} ]]; then
  export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000
fi

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

install_torch() {
    local pip=(.venv/bin/python -m pip) pinned=(${locked:+--constraint requirements.lock} "${TORCH[@]}")
    if [[ -n ${TORCH_INDEX:-} ]]; then
        "${pip[@]}" install --quiet --index-url "$TORCH_INDEX" "${pinned[@]}"
    elif "${pip[@]}" install --quiet --no-index "${pinned[@]}" 2>/dev/null; then
        return # it is there
    elif ! { [[ $(uname) == Linux ]] && "${pip[@]}" install --quiet uv &&
        # which looks at the driver; where PyTorch's own index cannot be reached this ends within seconds
        .venv/bin/python -m uv pip install --quiet --python .venv/bin/python --torch-backend auto "${pinned[@]}"; } 2>/dev/null; then
        echo "taking the package index's own build of PyTorch, which may be that for CUDA (several GB)" >&2
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
    install_torch
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

mode="" locked="" rest=()
for argument in "$@"; do
    case $argument in
    --help | -h)
        usage
        exit 0
        ;;
    --test | --lab)
        if [[ -n $mode && $mode != "$argument" ]]; then
            echo "error: --test and --lab are two calls" >&2
            exit 2
        fi
        mode=$argument
        ;;
    --locked) locked=yes ;;
    *) rest+=("$argument") ;;
    esac
done
set -- ${rest[@]+"${rest[@]}"} # an empty array is unknown to old shells

case $mode in
--test)
    pick_python "[test]" papermill pytest
    exec "$python" -m pytest "$@"
    ;;
--lab)
    pick_python "" jupyterlab
    echo "from another machine: ssh -N -L 8888:127.0.0.1:8888 THIS-ONE, then open the address below there" >&2
    # Containers and rented machines run as root; it stays on this machine, behind its token.
    [[ $EUID == 0 ]] && set -- --ServerApp.allow_root=True "$@"
    exec "$python" -m jupyterlab --ServerApp.ip=127.0.0.1 "$@" notebooks
    ;;
*)
    pick_python "" papermill
    exec "$python" -m tgazsr_utils.runner "$@"
    ;;
esac
