#!/usr/bin/env bash
# Everything that a CUDA device can settle, from a bare checkout with the Python that is there (torch, triton, pytest,
# hypothesis, setuptools, cmake, ninja, pybind11) and nvcc:
#
#   bench/gpu.sh [build | test | sanitize | micro | bench [SUBJECT...] | all]      (default: all)
#
# PYTHON=python3              the Python to use
# OUT=bench/results           where JSON and logs go
# JOBS=12                     test processes that share the device
#
# Each part takes less than ten minutes; one that takes longer is stopped and counts as failed. `all` runs them all, whatever
# fails, and ends with a summary. It measures the device as it is: no clock, power or mode is touched.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
JOBS=${JOBS:-12}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
LIMIT=590 # seconds a part

need_device() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "$1 needs a CUDA device and a torch that was built for it"; "$PYTHON" -m qwen2vl_fast.doctor; return 1; }
}

build() {
  timeout $LIMIT "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m qwen2vl_fast.doctor
}

# The tests are dealt to processes; those that fill the memory run afterwards, alone.
run_tests() {
  need_device "gpu.sh test" || return 1
  local parts status=0 without=()
  parts=$(mktemp -d)
  "$PYTHON" -c 'import av' 2>/dev/null || { without=(--ignore=tests/test_video.py --ignore=tests/test_video_files.py); echo "no av: the tests of video files are left out"; }
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  "$PYTHON" -m pytest -m 'gpu and not full' --collect-only -q -p no:cacheprovider "${without[@]}" >"$parts/collected" 2>&1
  grep '::' "$parts/collected" | grep -v '^ERROR' >"$parts/all"
  if [ ! -s "$parts/all" ]; then
    tail -n 40 "$parts/collected"
    return 1
  fi
  if grep '^ERROR' "$parts/collected"; then
    grep -h '^E  ' "$parts/collected" | sort | uniq -c
    status=1
  fi
  grep -E 'int32|beyond_32' "$parts/all" >"$parts/large"
  grep -vE 'int32|beyond_32' "$parts/all" >"$parts/small"
  split -n "r/$JOBS" "$parts/small" "$parts/part_"
  local part running=()
  for part in "$parts"/part_??; do
    pytest_on "$part" &
    running+=($!)
  done
  for part in "${running[@]}"; do wait "$part" || status=1; done
  [ ! -s "$parts/large" ] || pytest_on "$parts/large" || status=1
  cat "$parts"/*.log >"$OUT/gpu_test_details.log"
  grep -hE '^(FAILED|ERROR) ' "$parts"/*.log | sort
  grep -hE '^E  ' "$parts"/*.log | sort | uniq -c | sort -rn | head -n 60 | cut -c1-300
  echo "$(wc -l <"$parts/all") tests; of each process:"
  for part in "$parts"/*.log; do tail -n 1 "$part"; done
  rm -rf "$parts"
  return $status
}

pytest_on() {
  timeout $((LIMIT - 90)) xargs -d '\n' -a "$1" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --tb=short >"$1.log" 2>&1
}

sanitize() {
  need_device "gpu.sh sanitize" || return 1
  command -v compute-sanitizer >/dev/null || { echo "gpu.sh sanitize needs compute-sanitizer, which is part of the CUDA toolkit"; return 1; }
  local tool status=0
  "$PYTHON" -m bench.sanitize || return 1 # once without: what it compiles is then there
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((LIMIT / 4)) compute-sanitizer --tool $tool --error-exitcode 7 --print-limit 5 \
      "$PYTHON" -m bench.sanitize --tool $tool || { echo "$tool: failed ($?)"; status=1; }
  done
  # Each tool on the sm_80 kernels alone, and on copies with a bug planted, which it must find.
  timeout $LIMIT "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_sanitizer.py || status=1
  return $status
}

micro() {
  need_device "gpu.sh micro" || return 1
  timeout $LIMIT "$PYTHON" -m bench.micro --output "$OUT/micro_cuda.json"
}

bench() {
  [ $# -gt 0 ] || set -- $("$PYTHON" -m qwen2vl_fast.cli bench --list)
  local subject status=0
  for subject in "$@"; do
    echo "== $subject"
    timeout $LIMIT "$PYTHON" -m qwen2vl_fast.cli bench "$subject" --save "$OUT" || { echo "$subject: failed ($?)"; status=1; }
    [ "$subject" = attention ] || continue
    echo "== attention --backward"
    timeout $LIMIT "$PYTHON" -m qwen2vl_fast.cli bench attention --backward --save "$OUT" || { echo "attention --backward: failed ($?)"; status=1; }
  done
  return $status
}

part() {
  local name=$1
  shift
  "$@" 2>&1 | tee "$OUT/gpu_$name.log"
  return "${PIPESTATUS[0]}"
}

case ${1:-all} in
  build) part build build ;;
  test) part test run_tests ;;
  sanitize) part sanitize sanitize ;;
  micro) part micro micro ;;
  bench) part "bench${2:+_$2}" bench "${@:2}" ;;
  all)
    declare -A results
    for name in build test sanitize micro bench; do
      echo "=== $name"
      run=$name
      [ $name = test ] && run=run_tests
      start=$SECONDS
      if part $name $run; then results[$name]="passed"; else results[$name]="FAILED"; fi
      results[$name]+=" in $((SECONDS - start)) s"
    done
    failed=0
    for name in build test sanitize micro bench; do
      echo "$name ${results[$name]}"
      case ${results[$name]} in FAILED*) failed=1 ;; esac
    done
    exit $failed
    ;;
  *)
    sed -n '2,13p' "$0" | cut -c3-
    exit 2
    ;;
esac
