#!/usr/bin/env bash
# tests/upstream.sh CHECKOUT [arguments of pytest]: transformers' own tests of Qwen2-VL, from a checkout of transformers that
# you have, as they are and with every constructed model patched. Fails when a test fails patched that passes unpatched.
# The installed transformers must be the checkout's release. PYTHON=python3.12: another Python.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1/tests/models/qwen2_vl/test_modeling_qwen2_vl.py" ]; then
  echo "usage: tests/upstream.sh CHECKOUT, a folder with tests/models/qwen2_vl/test_modeling_qwen2_vl.py" >&2
  exit 2
fi
checkout=$(cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
outcomes=$(mktemp -d)
trap 'rm -rf "$outcomes"' EXIT
cd "$checkout"
for mode in plain patched; do
  "${PYTHON:-python3}" "$here/upstream.py" "$mode" "$outcomes/$mode.json" "$@"
done
"${PYTHON:-python3}" "$here/upstream.py" compare "$outcomes/plain.json" "$outcomes/patched.json"
