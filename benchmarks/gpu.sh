#!/usr/bin/env bash
# Runs what only a GPU can show, in one call and with the installed torch: build, suites, tests, a short training run.
#
#   benchmarks/gpu.sh RESULTS [PYTHON]
#   PARTS='build cascade chains' benchmarks/gpu.sh RESULTS     only these, in the order below
#   SECONDS_IN_ALL=480                                         time limit over all parts; 480 is the default
#
# Writes logs and rows into RESULTS and packs them into RESULTS/gpu.tar.gz after every part, so that an interrupted run
# keeps its finished parts. A part that fails is reported at the end and does not stop the others. Nothing is downloaded.
set -uo pipefail

RESULTS=${1:?usage: benchmarks/gpu.sh RESULTS [PYTHON]}
PYTHON=${2:-python3}
PARTS=${PARTS:-facts build info operators cascade training chains gradients memory one-pass suite demo}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-480}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

part() { # NAME SECONDS COMMAND...: run with a limit, log, pack
  local name=$1 seconds=$2 left=$((SECONDS_IN_ALL - SECONDS))
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return
  if ((left < 10)); then
    echo "== $name: no time left"
    failed+=("$name")
    return
  fi
  printf '\n== %s, %d s so far\n' "$name" "$SECONDS"
  if timeout "$((seconds < left ? seconds : left))" "$@" > >(tee "$RESULTS/$name.log") 2>&1; then
    echo "== $name: done"
  else
    echo "== $name: FAILED (exit $?)"
    failed+=("$name")
  fi
  tar -czf "$RESULTS/gpu.tar.gz.new" -C "$RESULTS" --exclude='gpu.tar.gz*' . && mv "$RESULTS/gpu.tar.gz.new" "$RESULTS/gpu.tar.gz"
}

bench() { # NAME SECONDS SUITES...: rows are written after each comparison
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$PYTHON" -m pytest -q "${@/#/benchmarks/}" --device cuda --budget 3 --save "$RESULTS/rows"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "benchmarks/gpu.sh: $PYTHON finds no CUDA GPU" >&2
  exit 2
}

part facts 60 bash -c "nvidia-smi; nvcc --version; $PYTHON -m torch.utils.collect_env"
part build 300 "$PYTHON" -m fastebm build
part info 60 "$PYTHON" -m fastebm info
bench operators 60 ops/test_langevin.py ops/test_normal.py ops/test_uniform.py ops/test_block_tail.py ops/test_expand_blend.py
bench cascade 150 end_to_end/test_cascade.py
bench training 120 end_to_end/test_training.py
bench chains 120 end_to_end/test_chains.py
bench gradients 150 end_to_end/test_energy_gradient.py
bench memory 60 end_to_end/test_memory.py
part one-pass 60 "$PYTHON" -m benchmarks.studies.one_pass "$RESULTS/one-pass" --device cuda
part suite 500 "$PYTHON" -m pytest tests/ops tests/compiler tests/models tests/sampling tests/evaluation -q --maxfail=20
part demo 300 "$PYTHON" -m fastebm demo --out "$RESULTS/demo"

echo
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all parts done: $RESULTS/gpu.tar.gz"
