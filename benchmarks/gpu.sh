#!/usr/bin/env bash
# What only a GPU can show, in one call of eight minutes: right first, then fast.
#
#   benchmarks/gpu.sh OUT [PYTHON]
#   KIT=build/gpu-kit benchmarks/gpu.sh OUT         with operators that `make gpu-kit` compiled, for the Python of the GPU machine
#   STEPS='facts bits peer' benchmarks/gpu.sh OUT   only these, in the order below
#   FASTEBM_REHEARSAL=1 benchmarks/gpu.sh OUT       the same on a CPU, with sizes that take seconds
#
# Each step has a limit, and all have SECONDS_IN_ALL together (480). A step writes its rows into OUT/rows as they come, and its
# log into OUT/logs, before the next begins; OUT/gpu.tar.gz has both after every step, and after Ctrl-C or SIGTERM. A step that
# fails does not stop others, and makes this script fail at its end. Nothing is downloaded, and no earlier rows are replaced.
# PYTHON (python3) needs torch with CUDA, numpy, safetensors and tqdm, and for the step core pytest and scipy. What rows say:
# benchmarks/README.md.
set -uo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
  exit 0
fi

refuse() { # WHY
  echo "benchmarks/gpu.sh: $1" >&2
  exit 2
}

EVERY_STEP='build facts warm bits replay sanitizer programs bandwidth instructions update peer core scale'
(($# == 1 || $# == 2)) || refuse "usage: benchmarks/gpu.sh OUT [PYTHON]"
OUT=$1
PYTHON=${2:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-480}
STEPS=${STEPS:-$EVERY_STEP}
REHEARSAL=${FASTEBM_REHEARSAL:-0}
SLOWER=1
[[ $REHEARSAL == 0 ]] || SLOWER=10 # limits are meant for a GPU
[[ $SECONDS_IN_ALL =~ ^[1-9][0-9]{0,5}$ ]] || refuse "SECONDS_IN_ALL must be a whole number of seconds, got '$SECONDS_IN_ALL'"
for name in $STEPS; do
  [[ " $EVERY_STEP " == *" $name "* ]] || refuse "there is no step '$name'; steps are $EVERY_STEP"
done
# Paths are those of the caller's folder.
[[ $PYTHON != */* ]] || PYTHON=$(realpath -s -- "$PYTHON")
command -v -- "$PYTHON" >/dev/null || refuse "there is no Python '$PYTHON'"
if [[ -n ${KIT:-} ]]; then
  KIT=$(realpath -m -- "$KIT")
  compgen -G "$KIT/_C*.so" >/dev/null || refuse "KIT has no compiled operators: $KIT"
  export KIT
fi
mkdir -p -- "$OUT/logs" "$OUT/rows" 2>/dev/null && [[ -w $OUT && -w $OUT/logs && -w $OUT/rows ]] ||
  refuse "OUT must be a folder that can be written to, got '$OUT'"
OUT=$(realpath -- "$OUT")
[[ -z $(ls -A -- "$OUT/rows") ]] || refuse "OUT has rows of an earlier run, which stay as they are; give another folder than $OUT"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHON
# What runs is what is measured, and no choice of the caller's shell.
unset FASTEBM_BACKEND FASTEBM_CPU FASTEBM_GRAPHS
[[ $REHEARSAL != 0 ]] || unset TRITON_INTERPRET
failed=()
running=

pack() {
  tar -czf "$OUT/gpu.tar.gz.new" -C "$OUT" logs rows && mv "$OUT/gpu.tar.gz.new" "$OUT/gpu.tar.gz"
}

wanted() { [[ " $STEPS " == *" $1 "* ]]; }

step() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$(($2 * SLOWER)) left=$((SECONDS_IN_ALL - SECONDS)) code shown
  shift 2
  wanted "$name" || return 0
  if ((left < 10)); then
    echo "== $name: no time left"
    failed+=("$name")
    return 1
  fi
  printf '\n== %s, %d s so far\n' "$name" "$SECONDS"
  # Into a file: what a step leaves running can't hold up the next one, as it would at the end of a pipe.
  : >"$OUT/logs/$name.log"
  timeout -k 5 "$((seconds < left ? seconds : left))" "$@" >"$OUT/logs/$name.log" 2>&1 </dev/null &
  running=$!
  tail -f -s 0.2 -n +1 --pid="$running" -- "$OUT/logs/$name.log" &
  shown=$!
  wait "$running"
  code=$?
  running=
  wait "$shown"
  echo "{\"step\": \"$name\", \"exit\": $code, \"seconds_so_far\": $SECONDS}" >>"$OUT/rows/steps.jsonl" || code=${code/#0/1}
  pack || code=${code/#0/1}
  ((code != 0)) || return 0
  echo "== $name: FAILED (exit $code)"
  failed+=("$name")
  return 1
}

interrupted() {
  trap '' INT TERM
  echo "== stopped after $SECONDS s"
  [[ -z $running ]] || { kill "$running" && wait "$running"; } # timeout hands it on to all of the step
  pack
  exit 130
}
trap interrupted INT TERM

ours() { # NAME SECONDS
  step "$1" "$2" "$PYTHON" -m benchmarks.gpu "$1" "$OUT"
}

needed=(torch numpy safetensors tqdm) # of what steps import; a kit has compiled operators alone
! wanted core || needed+=(pytest scipy)
missing=$("$PYTHON" -c 'import sys, importlib.util as i; print(*(n for n in sys.argv[1:] if not i.find_spec(n)))' "${needed[@]}")
[[ -z $missing ]] || refuse "$PYTHON lacks what steps import: $PYTHON -m pip install $missing"
if [[ $REHEARSAL == 0 ]]; then
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || refuse "$PYTHON finds no CUDA GPU"
fi

# Compiled operators: from the kit, or made here, also where the kit is for another Python or torch.
install_kit() {
  cp --remove-destination "$KIT"/_*.so fastebm/ &&
    "$PYTHON" -W ignore -c 'import sys; from fastebm.ops import backends; sys.exit(backends.unavailable_reason("cpp", "cpu"))'
}
export -f install_kit
if [[ -z ${KIT:-} ]] || ! step build 20 bash -c install_kit || ! compgen -G "$KIT/_cuda*.so" >/dev/null; then
  [[ $REHEARSAL != 0 ]] || step build 200 "$PYTHON" -m fastebm build
fi
ours facts 40
ours warm 60
ours bits 40
ours replay 50
if [[ $REHEARSAL == 0 ]] && command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m benchmarks.gpu small "$OUT"
else
  ! wanted sanitizer || echo "compute-sanitizer is not at hand: its net runs without it"
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
