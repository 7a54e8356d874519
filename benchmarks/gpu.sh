#!/usr/bin/env bash
# Everything that only a GPU can show, in one call, with the torch that is there: build, suite, benchmarks, a short training run.
#
#   benchmarks/gpu.sh OUT [PYTHON]
#
# Writes logs and raw figures into OUT and packs them into OUT/gpu.tar.gz after every part, so that a run that is cut short
# leaves what it had done. A part that fails is reported at the end and does not stop the others. Nothing is downloaded.
set -uo pipefail

OUT=${1:?usage: benchmarks/gpu.sh OUT [PYTHON]}
PYTHON=${2:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

part() { # NAME SECONDS COMMAND...: run with a limit, log, pack
  local name=$1 seconds=$2
  shift 2
  printf '\n== %s\n' "$name"
  if timeout "$seconds" "$@" > >(tee "$OUT/$name.log") 2>&1; then
    echo "== $name: done"
  else
    echo "== $name: FAILED (exit $?)"
    failed+=("$name")
  fi
  tar -czf "$OUT/gpu.tar.gz.new" -C "$OUT" --exclude='gpu.tar.gz*' . && mv "$OUT/gpu.tar.gz.new" "$OUT/gpu.tar.gz"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "benchmarks/gpu.sh: $PYTHON finds no CUDA GPU" >&2
  exit 2
}

part facts 60 bash -c "nvidia-smi; nvcc --version; $PYTHON -m torch.utils.collect_env"
part build 300 "$PYTHON" -m fastebm.cli build
part info 60 "$PYTHON" -m fastebm.cli info
part suite 500 "$PYTHON" -m pytest tests/ops tests/gradient tests/models tests/sampling -q --maxfail=20
part benchmarks 500 "$PYTHON" -m pytest benchmarks -q -s --device cuda --save "$OUT/benchmarks.json"
part training 300 "$PYTHON" -m fastebm.cli demo --out "$OUT/demo"

echo
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts done: $OUT/gpu.tar.gz"
