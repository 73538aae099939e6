#!/usr/bin/env bash
# Everything that a CUDA device can settle, from a bare checkout with the Python that is there (torch, triton, transformers and
# what it brings, pillow, jinja2, pytest, hypothesis, setuptools, cmake, ninja, pybind11) and nvcc:
#
#   bench/gpu.sh [build | test | sanitize | micro | variants | profile | bench [SUBJECT...] | hopper | all [STEP...]]
#                                                                                                       (default: all)
#   hopper: the attention forward alone within ten minutes: built, right on the device, profiled, timed against its peers and in
#   all its forms
#
# PYTHON=python3              the Python to use
# OUT=bench/results           where JSON and logs go
# JOBS=12                     test processes that share the device
# BUDGET=                     seconds that `all` may take (default: as long as it takes; `hopper` 590)
#
# Each part takes less than ten minutes; one that takes longer is stopped and counts as failed. `all` takes its steps in order of
# what they are worth, whatever fails, and ends with a summary. A step that passed on these very sources and device is not
# repeated: with the same OUT a second call goes on where the first one stopped. It measures the device as it is: no clock,
# power or mode is touched.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/cuda/bin

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
JOBS=${JOBS:-12}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
LIMIT=590 # seconds a part
BUDGET=${BUDGET:-}

within() { # SECONDS command...
  timeout -k 10 "$@"
}

need_device() {
  within 60 "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "$1 needs a CUDA device and a torch that was built for it"; within 60 "$PYTHON" -m qwen2vl_fast.doctor; return 1; }
}

need_nvcc() {
  command -v nvcc >/dev/null || { echo "$1 needs nvcc"; return 1; }
}

build() {
  within $((LIMIT * 9 / 10)) "$PYTHON" setup.py build_ext --inplace && within $((LIMIT / 10)) "$PYTHON" -m qwen2vl_fast.doctor
}

# Files of the attention's tests on a device.
ATTENTION=(tests/test_extension_attention.py tests/host/test_on_device.py)

# The tests that pytest finds so are dealt to processes; those that fill the memory run afterwards, alone.
run_tests() { # NAME of the log [pytest's ARGUMENTS...]
  local details="$OUT/gpu_$1_details.log"
  shift
  need_device "gpu.sh test" || return 1
  # The sanitizers and microbenchmarks are steps of their own, with limits of their own.
  local parts status=0 without=(--ignore=tests/test_sanitizer.py --ignore=tests/test_bench_micro.py)
  parts=$(mktemp -d)
  within 60 "$PYTHON" -c 'import av' 2>/dev/null || { without+=(--ignore=tests/test_video.py --ignore=tests/test_video_files.py); echo "no av: the tests of video files are left out"; }
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  within $((LIMIT * 2 / 10)) "$PYTHON" -m pytest -m 'gpu and not full' --collect-only -q -p no:cacheprovider "${without[@]}" "$@" \
    >"$parts/collected" 2>&1
  case $? in 124 | 137) echo "collecting the tests took more than $((LIMIT * 2 / 10)) s"; return 1 ;; esac
  grep '::' "$parts/collected" | grep -v '^ERROR' >"$parts/all"
  if [ ! -s "$parts/all" ]; then
    tail -n 40 "$parts/collected"
    return 1
  fi
  if grep '^ERROR' "$parts/collected"; then
    grep -h '^E  ' "$parts/collected" | sort | uniq -c
    status=1
  fi
  grep -E 'int32|beyond_32|2_31' "$parts/all" >"$parts/large"
  grep -vE 'int32|beyond_32|2_31' "$parts/all" >"$parts/small"
  split -n "r/$JOBS" "$parts/small" "$parts/part_"
  local part running=()
  for part in "$parts"/part_??; do
    pytest_on "$part" 6 &
    running+=($!)
  done
  for part in "${running[@]}"; do wait "$part" || status=1; done
  [ ! -s "$parts/large" ] || pytest_on "$parts/large" 2 || status=1
  cat "$parts"/*.log >"$details"
  grep -hE '^(FAILED|ERROR) ' "$parts"/*.log | sort
  grep -hE '^E  ' "$parts"/*.log | sort | uniq -c | sort -rn | head -n 60 | cut -c1-300
  echo "$(wc -l <"$parts/all") tests; of each process:"
  for part in "$parts"/*.log; do tail -n 1 "$part"; done
  rm -rf "$parts"
  return $status
}

pytest_on() { # FILE of test names, TENTHS of the part's time
  within $((LIMIT * $2 / 10)) xargs -r -d '\n' -a "$1" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --tb=short >"$1.log" 2>&1
}

sanitize() {
  need_device "gpu.sh sanitize" || return 1
  command -v compute-sanitizer >/dev/null || { echo "gpu.sh sanitize needs compute-sanitizer, which is part of the CUDA toolkit"; return 1; }
  local tool status=0
  # Once without a tool: what it compiles is then there.
  within $((LIMIT / 4)) "$PYTHON" -m bench.sanitize || { echo "without a tool: failed ($?)"; return 1; }
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within $((LIMIT / 7)) compute-sanitizer --tool $tool --error-exitcode 7 --print-limit 5 \
      "$PYTHON" -m bench.sanitize --tool $tool || { echo "$tool: failed ($?)"; status=1; }
  done
  # Each tool on the sm_80 kernels alone, and on copies with a bug planted, which it must find.
  within $((LIMIT / 6)) "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_sanitizer.py || status=1
  return $status
}

micro() {
  need_device "gpu.sh micro" && need_nvcc "gpu.sh micro" || return 1
  within $LIMIT "$PYTHON" -m bench.micro --output "$OUT/micro_cuda.json"
}

# All forms of the Hopper forward; `python -m bench.variants --choose` then makes the best one the extension's.
variants() {
  need_device "gpu.sh variants" && need_nvcc "gpu.sh variants" || return 1
  within $LIMIT "$PYTHON" -m bench.variants --save "$OUT"
}

# What the units of a multiprocessor do during one launch of the attention forward. The shares of the single pipes are in the bodies
# of the sections, which are printed only when they are asked for.
profile() {
  need_device "gpu.sh profile" || return 1
  command -v ncu >/dev/null || { echo "gpu.sh profile needs ncu, Nsight Compute of the CUDA toolkit"; return 1; }
  within $LIMIT ncu --clock-control none --kernel-name-base demangled --kernel-name regex:Forward --launch-skip 2 --launch-count 1 \
    --section SpeedOfLight --section ComputeWorkloadAnalysis --section SchedulerStats --section WarpStateStats --section LaunchStats \
    --print-details all \
    "$PYTHON" -m bench.profile
}

test_attention() {
  run_tests test_attention "${ATTENTION[@]}"
}

test_rest() {
  run_tests test_rest "${ATTENTION[@]/#/--ignore=}"
}

subject() {
  within $LIMIT "$PYTHON" -m qwen2vl_fast.cli bench "$@" --save "$OUT"
}

bench() {
  [ $# -gt 0 ] || set -- $(within 60 "$PYTHON" -m qwen2vl_fast.cli bench --list)
  local name status=0
  for name in "$@"; do
    echo "== $name"
    subject "$name" || { echo "$name: failed ($?)"; status=1; }
    [ "$name" = attention ] || continue
    echo "== attention --backward"
    subject attention --backward || { echo "attention --backward: failed ($?)"; status=1; }
  done
  return $status
}

part() {
  local name=$1
  shift
  "$@" 2>&1 | tee "$OUT/gpu_$name.log"
  return "${PIPESTATUS[0]}"
}

# What `all` does, the most valuable first: step, seconds at most, command.
STEPS=(
  "build 590 build"
  "test_attention 150 test_attention"
  "test_rest 300 test_rest"
  "rope 90 subject rope"
  "mrope 90 subject mrope"
  "host 60 subject host"
  "attention 240 subject attention"
  "tower 240 subject tower"
  "merge 60 subject merge"
  "loss 90 subject loss"
  "profile 60 profile"
  "activations 120 subject activations"
  "generate 180 subject generate"
  "attention_backward 240 subject attention --backward"
  "patch 240 subject patch"
  "train 180 subject train"
  "preprocess 90 subject preprocess"
  "norms 120 subject norms"
  "patchify 60 subject patchify"
  "stories 240 subject stories"
  "variants 300 variants"
  "sanitize 590 sanitize"
  "micro 400 micro"
  "generate_7B 240 subject generate --size 7B"
)

state() { # of the sources, the device and whether there is an extension, in a few letters: another device measures anew
  {
    find kernels qwen2vl_fast csrc bench tests -type f \( -name '*.py' -o -name '*.cu*' -o -name '*.cpp' -o -name '*.h' -o -name '*.sh' \) \
      -not -path '*/results/*' -print0 | sort -z | xargs -0 sha256sum
    find qwen2vl_fast -maxdepth 1 -name '_C*.so' | sort
    nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null
  } | sha256sum | cut -c1-12
}

all() {
  local began=$SECONDS now failed=0 left=0 line name most command summary=()
  now=$(state)
  mkdir -p "$OUT/done"
  for line in "${STEPS[@]}"; do
    read -r name most command <<<"$line"
    [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
    if [ "$(cat "$OUT/done/$name" 2>/dev/null)" = "$now" ]; then
      summary+=("$name passed before")
      continue
    fi
    LIMIT=$most
    if [ -n "$BUDGET" ]; then
      local rest=$((BUDGET - (SECONDS - began) - 10))
      [ $LIMIT -le $rest ] || LIMIT=$rest
      if [ $LIMIT -lt 20 ]; then
        summary+=("$name not reached")
        left=1
        continue
      fi
    fi
    echo "=== $name"
    local start=$SECONDS
    if part "$name" $command; then
      [ "$name" != build ] || now=$(state)
      echo "$now" >"$OUT/done/$name"
      summary+=("$name passed in $((SECONDS - start)) s")
    else
      summary+=("$name FAILED in $((SECONDS - start)) s")
      failed=1
    fi
  done
  printf '%s\n' "${summary[@]}" | tee "$OUT/gpu_summary.log"
  [ $failed = 0 ] || return 1
  [ $left = 0 ] || return 3
}

case ${1:-all} in
  build) part build build ;;
  test) part test run_tests test ;;
  sanitize) part sanitize sanitize ;;
  micro) part micro micro ;;
  variants) part variants variants ;;
  profile) part profile profile ;;
  bench) part "bench${2:+_$2}" bench "${@:2}" ;;
  hopper) BUDGET=${BUDGET:-590} all build test_attention profile attention variants ;;
  all)
    for name in "${@:2}"; do
      printf '%s\n' "${STEPS[@]}" | grep -q "^$name " || { echo "no step $name; there are: $(printf '%s\n' "${STEPS[@]}" | cut -d' ' -f1 | xargs)"; exit 2; }
    done
    all "${@:2}"
    ;;
  *)
    sed -n '2,18p' "$0" | cut -c3-
    exit 2
    ;;
esac
