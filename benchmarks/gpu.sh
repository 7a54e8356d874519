#!/usr/bin/env bash
# What only a GPU can show, in one call of eight minutes: right first, then fast.
#
#   benchmarks/gpu.sh OUT [PYTHON]
#   KIT=build/gpu-kit benchmarks/gpu.sh OUT         with operators that `make gpu-kit` compiled, for the Python of the GPU machine
#   STEPS='facts bits peer' benchmarks/gpu.sh OUT   only these, in the order below
#   FASTEBM_REHEARSAL=1 benchmarks/gpu.sh OUT       the same on a CPU, with sizes that take seconds
#
# Each step has a limit, and all have SECONDS_IN_ALL together (480). A step writes its rows into OUT/rows as they come, and its
# log into OUT/logs, before the next begins; OUT/gpu.tar.gz has both after every step. A step that fails does not stop others,
# and makes this script fail at its end. Nothing is downloaded.
set -uo pipefail

OUT=${1:?usage: benchmarks/gpu.sh OUT [PYTHON]}
PYTHON=${2:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-480}
STEPS=${STEPS:-build facts warm bits replay sanitizer programs bandwidth instructions update peer core scale}
REHEARSAL=${FASTEBM_REHEARSAL:-0}
SLOWER=1
[[ $REHEARSAL == 0 ]] || SLOWER=10 # limits are meant for a GPU
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$OUT/logs" "$OUT/rows"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

pack() {
  tar -czf "$OUT/gpu.tar.gz.new" -C "$OUT" logs rows && mv "$OUT/gpu.tar.gz.new" "$OUT/gpu.tar.gz"
}

step() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$(($2 * SLOWER)) left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  [[ " $STEPS " == *" $name "* ]] || return
  if ((left < 10)); then
    echo "== $name: no time left"
    failed+=("$name")
    return
  fi
  printf '\n== %s, %d s so far\n' "$name" "$SECONDS"
  timeout -k 5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee "$OUT/logs/$name.log"
  code=${PIPESTATUS[0]}
  echo "{\"step\": \"$name\", \"exit\": $code, \"seconds_so_far\": $SECONDS}" >>"$OUT/rows/steps.jsonl"
  if ((code != 0)); then
    echo "== $name: FAILED (exit $code)"
    failed+=("$name")
  fi
  pack
}

ours() { # NAME SECONDS
  step "$1" "$2" "$PYTHON" -m benchmarks.gpu "$1" "$OUT"
}

if [[ $REHEARSAL == 0 ]]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "benchmarks/gpu.sh: $PYTHON finds no CUDA GPU" >&2
    exit 2
  }
fi
rm -f "$OUT/rows/steps.jsonl"

# Compiled operators: from the kit, or made here.
install_kit() { cp "$KIT"/_C*.so "$KIT"/_cuda*.so fastebm/; }
if [[ -n ${KIT:-} ]]; then
  export KIT
  export -f install_kit
  step build 20 bash -c install_kit
elif [[ $REHEARSAL == 0 ]]; then
  step build 200 "$PYTHON" -m fastebm build
fi
ours facts 40
ours warm 60
ours bits 40
ours replay 50
if [[ $REHEARSAL == 0 ]] && command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu small "$OUT"
else
  echo "compute-sanitizer is not at hand: its net runs without it"
  step sanitizer 60 "$PYTHON" -m benchmarks.gpu small "$OUT"
fi
ours programs 60
ours bandwidth 20
ours instructions 40
ours update 40
ours peer 150
core=(tests/ops/test_normal.py tests/ops/test_langevin.py tests/ops/test_program.py tests/sampling/test_graphs.py)
only=(-k "cuda or test_graphs")
[[ $REHEARSAL == 0 ]] || only=(--collect-only)
step core 90 "$PYTHON" -m pytest -x -q -p no:cacheprovider "${only[@]}" "${core[@]}"
ours scale 90

echo
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps done in $SECONDS s: $OUT/gpu.tar.gz"
