#!/usr/bin/env bash
# Everything that only a GPU can show, in one call, with the torch that is there: build, suite, benchmarks, a short training run.
#
#   benchmarks/gpu.sh RESULTS [PYTHON]
#
# Writes logs and raw figures into RESULTS and packs them into RESULTS/gpu.tar.gz after every part, so that a run that is cut short
# leaves what it had done. A part that fails is reported at the end and does not stop the others. Nothing is downloaded.
set -uo pipefail

RESULTS=${1:?usage: benchmarks/gpu.sh RESULTS [PYTHON]}
PYTHON=${2:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

part() { # NAME SECONDS COMMAND...: run with a limit, log, pack
  local name=$1 seconds=$2
  shift 2
  printf '\n== %s\n' "$name"
  if timeout "$seconds" "$@" > >(tee "$RESULTS/$name.log") 2>&1; then
    echo "== $name: done"
  else
    echo "== $name: FAILED (exit $?)"
    failed+=("$name")
  fi
  tar -czf "$RESULTS/gpu.tar.gz.new" -C "$RESULTS" --exclude='gpu.tar.gz*' . && mv "$RESULTS/gpu.tar.gz.new" "$RESULTS/gpu.tar.gz"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "benchmarks/gpu.sh: $PYTHON finds no CUDA GPU" >&2
  exit 2
}

part facts 60 bash -c "nvidia-smi; nvcc --version; $PYTHON -m torch.utils.collect_env"
part build 300 "$PYTHON" -m fastebm.cli build
part info 60 "$PYTHON" -m fastebm.cli info
part suite 500 "$PYTHON" -m pytest tests/ops tests/gradient tests/models tests/sampling -q --maxfail=20
part benchmarks 500 "$PYTHON" -m pytest benchmarks -q -s --device cuda --save "$RESULTS/benchmarks.json"
part training 300 "$PYTHON" -m fastebm.cli demo --out "$RESULTS/demo"

echo
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts done: $RESULTS/gpu.tar.gz"
