#!/usr/bin/env bash
# tests/upstream.sh CHECKOUT [arguments of pytest]: transformers' own tests of Qwen2-VL, from a checkout of transformers that
# you have, as they are and with every constructed model patched. Fails when a test fails patched that passes unpatched.
# CHECKOUT may be an unpacked source distribution (pip download --no-binary transformers --no-deps transformers==VERSION): it has
# the tests that all models share, which tests/upstream_model.py applies. They need `parameterized` installed.
# The installed transformers must be the checkout's release. PYTHON=python3.12: another Python.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1/tests/test_modeling_common.py" ]; then
  echo "usage: tests/upstream.sh CHECKOUT, a folder with tests/test_modeling_common.py of transformers" >&2
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
