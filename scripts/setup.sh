#!/bin/sh
# Installs what the build (no argument), the tests (--test) or the benchmarks (--bench) need on Debian 12, and says why;
# with --cuda, what the build for GPUs needs besides CUDA itself. Nothing missing: nothing happens. Called by `make run`,
# `make test` and `make bench`.
# Headers may also lie in $DEPS, and a program somewhere else on PATH: what is there by any way is not installed again.
set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") set_name="building" ;;
    --test) set_name="testing" ;;
    --bench) set_name="benchmarks" ;;
    --cuda) set_name="cuda" ;;
    *) echo "setup.sh: unknown argument $1; use none, --test, --bench or --cuda" >&2; exit 2 ;;
esac

# package, a file that it brings (PROGRAM, include:HEADER or /path), the reason
packages() {
    cat <<'END'
g++                  g++                                               compiles the program
libcli11-dev         include:CLI/CLI.hpp                               CLI11 reads the command line (headers)
nlohmann-json3-dev   include:nlohmann/json.hpp                         reads and writes JSON (headers)
libxxhash-dev        include:xxhash.h                                  XXH3 checksums of checkpoints (headers)
END
    [ "$set_name" = building ] && return
    if [ "$set_name" = cuda ]; then
        echo 'python3-venv /usr/lib/python3.11/ensurepip an environment for the headers of the cuDNN front end'
        return
    fi
    cat <<'END'
libopenmpi-dev       mpicc                                             Open MPI, for ranks as processes (without it: threads)
openmpi-bin          mpirun                                            its launcher
libgtest-dev         include:gtest/gtest.h                             GoogleTest, the unit tests
libboost-context-dev include:boost/context/fiber.hpp                   fibers, on which tests run CUDA kernels without a GPU
clang-format         clang-format                                      checks the formatting
python3-torch        /usr/lib/python3/dist-packages/torch              PyTorch, the reference that the model is compared with
python3-pytest       /usr/lib/python3/dist-packages/pytest             tests of the program from outside
python3-numpy        /usr/lib/python3/dist-packages/numpy              reads tensors in those tests
python3-matplotlib   /usr/lib/python3/dist-packages/matplotlib         dev/plot.py draws loss curves
python3-venv         /usr/lib/python3.11/ensurepip                     environments for Python packages that Debian lacks
END
    [ "$set_name" = testing ] && return
    cat <<'END'
libopenblas0-pthread /usr/lib/x86_64-linux-gnu/openblas-pthread          matrix products of Debian's PyTorch at full speed
python3-dev          include:python3.11/Python.h                       torch.compile builds against Python's headers
END
}

present() {  # package, what it brings
    dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q ' installed$' && return 0
    case "$2" in
        include:*) [ -e "/usr/include/${2#include:}" ] || { [ -n "${DEPS:-}" ] && [ -e "$DEPS/${2#include:}" ]; } ;;
        /*) [ -e "$2" ] ;;
        *) command -v "$2" >/dev/null ;;
    esac
}

missing=""
while read -r package brings reason; do
    present "$package" "$brings" && continue
    [ -n "$missing" ] || echo "Missing for $set_name:"
    printf '  %-20s %s\n' "$package" "$reason"
    missing="$missing $package"
done <<END
$(packages)
END

if [ -n "$missing" ]; then
    as_root=""
    if ! command -v apt-get >/dev/null; then
        echo "setup.sh: there is no apt-get here; install the above in your system's way, or put the headers into a" >&2
        echo "directory and pass it as DEPS=DIR." >&2
        exit 1
    elif [ "$(id -u)" != 0 ]; then
        if ! command -v sudo >/dev/null; then
            echo "setup.sh: installing needs root, and there is no sudo; run as root: apt-get install$missing" >&2
            exit 1
        fi
        as_root="sudo"
    fi
    echo "Installing them with apt-get (it writes to build/setup.log)."
    install() {
        # shellcheck disable=SC2086  # the list is split on purpose
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing </dev/null
    }
    mkdir -p build
    log=build/setup.log
    # The lists of packages may be absent or too old to install from: then, and only then, they are fetched.
    if ! install >$log 2>&1; then
        if ! { $as_root apt-get update -q </dev/null && install; } >$log 2>&1; then
            tail -n 20 $log >&2
            echo "setup.sh: apt-get could not install$missing; all it said is in $log" >&2
            exit 1
        fi
    fi
fi

# An environment of Debian's Python with packages from PyPI.
environment() {  # directory, what tells that it is complete, reason, option of venv, arguments of pip
    directory=$1 complete=$2 reason=$3 option=$4
    shift 4
    for found in "$directory"/lib/python3*/site-packages/$complete; do
        [ -e "$found" ] && return
    done
    echo "Making $directory: $reason"
    rm -rf "$directory"
    mkdir -p build
    if ! { /usr/bin/python3 -m venv $option "$directory" &&
           "$directory/bin/pip" install --quiet --disable-pip-version-check "$@"; } >build/setup.log 2>&1 </dev/null; then
        tail -n 20 build/setup.log >&2
        rm -rf "$directory"
        echo "setup.sh: $directory could not be made; all that was said is in build/setup.log" >&2
        exit 1
    fi
}
# Without its dependencies, compilers for kernels in Python: they are 650 MB for 3 MB of headers.
if [ "$set_name" = cuda ] && [ ! -e "${CUDNN_FRONTEND:-/usr/include}/cudnn_frontend.h" ]; then
    environment build/venv-cuda "nvidia_cudnn_frontend-1.32.0.dist-info" \
        "its include folder is the cuDNN front end 1.32.0, for attention on GPUs (headers)" \
        "" --no-deps nvidia-cudnn-frontend==1.32.0
fi
if [ "$set_name" = testing ] || [ "$set_name" = benchmarks ]; then
    environment build/venv "pyarrow-15.0.2.dist-info" \
        "transformers 4.38.2, which works with Debian's PyTorch, loads our checkpoints; pyarrow writes Parquet" \
        --system-site-packages transformers==4.38.2 pyarrow==15.0.2
fi
if [ "$set_name" = benchmarks ]; then
    environment build/venv-torch "torch-*.dist-info" "the current PyTorch, to compare the speed with (some GB)" \
        "" torch numpy
fi
