#!/usr/bin/env bash
# Runs each fuzzer for some seconds, from the seeds that make_corpus.py writes; a crash ends it and leaves its input.
#
#   tests/fuzz/run.sh build-fuzz 600 [target...]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:?the build folder} seconds=${2:?seconds for each target}
shift 2
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(rows csv json parquet tokenizer chat_template safetensors manifest job_yaml training_service worker_service)
tests/fuzz/make_corpus.py "$build/corpus"
# The services keep databases; in memory they need not wait for a disk.
[ -w /dev/shm ] && export TMPDIR=/dev/shm
failed=()
for target in "${targets[@]}"; do
  echo "== $target"
  mkdir -p "$build/found/$target" "$build/corpus/$target"
  # gRPC begins and ends threads of its own between two inputs, which looks as if an input had leaked them.
  leaks=1; [[ $target == *_service ]] && leaks=0
  # A template or page may double what it holds within one step, so one input may take some memory.
  "$build/bin/fuzz_$target" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=1 -detect_leaks=$leaks \
    -artifact_prefix="$build/found/$target-" "$build/found/$target" "$build/corpus/$target" 2>"$build/found/$target.log" \
    || failed+=("$target")
  grep -E "stat::number_of_executed_units|SUMMARY" "$build/found/$target.log" || true
done
[ ${#failed[@]} -eq 0 ] || { echo "fuzz: FAILED: ${failed[*]}; see $build/found" >&2; exit 1; }
