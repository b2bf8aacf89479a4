#!/usr/bin/env bash
# `make parity`: compares the trainer with live TRL and transformers, and the committed goldens with freshly made ones.
# Needs the Python side (deploy/install-deps.sh --with parity, 6 GB), which it installs when it is missing, and the
# built worker: SIMPO_BIN_DIR names its folder (build/bin).
set -euo pipefail
cd "$(dirname "$0")/../.."

deps=${SIMPO_DEPS:-${XDG_CACHE_HOME:-$HOME/.cache}/simpo-deps}
worker=${SIMPO_BIN_DIR:-build/bin}/simpo-worker
[ -x "$worker" ] || { echo "parity: $worker is not there; run 'make build' first, or set SIMPO_BIN_DIR" >&2; exit 1; }
deploy/install-deps.sh --with parity
python=$deps/parity-venv/bin/python

# Real tokenizers, for tests only: they stay in the cache folder.
tokenizers=$deps/parity-tokenizers
if ! cmp -s tests/parity/tokenizers/package-lock.json "$tokenizers/.complete"; then
  mkdir -p "$tokenizers"
  cp tests/parity/tokenizers/package.json tests/parity/tokenizers/package-lock.json "$tokenizers"
  npm ci --silent --no-audit --no-fund --ignore-scripts --prefix "$tokenizers"
  cp tests/parity/tokenizers/package-lock.json "$tokenizers/.complete"
fi

# glibc gives large blocks back to the system at once; half of the time would go into faulting their pages in again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

start=$SECONDS failed=() closing=()
# Runs one part; its last line is its figures.
run() {
  local output
  output=$(mktemp)
  "$python" -W ignore "$@" | tee "$output" || failed+=("$(basename "$1")")
  closing+=("$(tail -n 1 "$output")")
  rm "$output"
}

# Another version of anything would compare with something else than what the goldens say.
run tests/parity/check_versions.py tests/parity/requirements.txt
run tests/parity/make_goldens.py --check
run tests/parity/make_text_goldens.py --check
run tests/parity/compare_tokens.py --worker "$worker" --tokenizers "$tokenizers"
run tests/parity/compare_princeton.py --worker "$worker" --tokenizers "$tokenizers"
run tests/parity/compare_trl.py --worker "$worker" --tokenizers "$tokenizers"
run tests/parity/check_hub.py --worker "$worker"
run tests/parity/check_families.py --worker "$worker"

if [ ${#failed[@]} -gt 0 ]; then
  echo "parity: FAILED in ${failed[*]} (see above)" >&2
  exit 1
fi
printf 'parity: %s\n' "${closing[@]}"
echo "parity: all equal, in $((SECONDS - start)) s"
