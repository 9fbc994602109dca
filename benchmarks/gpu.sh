#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes on one H100: the gpu-marked tests, the kernel suite, and the
# family benchmarks there are. Uses this machine's own python3 (3.12, torch 2.11, triton 3.6), no uv and no network; packages that
# are missing there are brought as wheels.
#
#   benchmarks/gpu.sh --out DIR [--wheels DIR] [--compare OLD.json] [--seconds N]
#
# Leaves DIR/sparing-gpu.tar.gz (at most 16 MiB): logs, kernels.json, kernels.md, kernels.png, one folder a benchmark, summary.txt.
# Exit code 0 when every stage passed, 1 when one failed or ran out of time, 2 for wrong arguments.
# It reads the GPU and never changes its settings.
#
# Wheels, made where there is a network (one version of each, no dependencies of theirs):
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux2014_x86_64 --platform any -d wheels einops pytest pluggy iniconfig packaging timm diffusers \
#     open_clip_torch ftfy wcwidth regex xformers \
#     matplotlib contourpy cycler fonttools kiwisolver pyparsing \
#     python-dateutil six pillow typer click shellingham rich markdown-it-py mdurl pygments
set -uo pipefail

out="" wheels="" compare="" seconds=520
while [ $# -gt 0 ]; do
  case "$1" in
    --out|--wheels|--compare|--seconds) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
  esac
  case "$1" in
    --out) out="${2:-}"; shift 2 ;;
    --wheels) wheels="${2:-}"; shift 2 ;;
    --compare) compare="${2:-}"; shift 2 ;;
    --seconds) seconds="${2:-}"; shift 2 ;;
    *) echo "error: unknown argument $1; usage: $0 --out DIR [--wheels DIR] [--compare OLD.json] [--seconds N]" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "error: --out DIR is required" >&2; exit 2; }
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "error: --wheels $wheels is no folder" >&2; exit 2; }
[ -z "$compare" ] || [ -f "$compare" ] || { echo "error: --compare $compare is no file" >&2; exit 2; }
case "$seconds" in ''|*[!0-9]*) echo "error: --seconds $seconds is no number of seconds" >&2; exit 2 ;; esac

root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "$out" && out="$(cd "$out" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
results="$work/results"
mkdir -p "$results"
summary="$results/summary.txt"
began=$SECONDS
failed=0

left() { echo $((seconds - (SECONDS - began))); }

# stage NAME LIMIT COMMAND...: run with what time is left, at most LIMIT seconds; log and note the outcome.
stage() {
  local name="$1" limit="$2" start=$SECONDS code=0
  shift 2
  local budget
  budget="$(left)"
  [ "$budget" -lt "$limit" ] && limit="$budget"
  if [ "$limit" -lt 5 ]; then
    echo "$name: not started, no time left" | tee -a "$summary"
    failed=1
    return
  fi
  timeout --kill-after=5 "$limit" "$@" > "$results/$name.log" 2>&1 || code=$?
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    echo "$name: out of time after ${limit} s" | tee -a "$summary"
  else
    echo "$name: exit $code, $((SECONDS - start)) s" | tee -a "$summary"
  fi
  [ "$code" = 0 ] || { failed=1; tail -n 15 "$results/$name.log"; }
}

site="$work/site"
if [ -n "$wheels" ]; then
  stage install 60 python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$root${wheels:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
unset TRITON_INTERPRET
cd "$root" || exit 2

earlier=$failed failed=0  # a wheel that does not install costs its peer, not the run
stage machine 30 python3 -c '
import platform, shutil, subprocess, sys, torch
print(platform.platform(), sys.version)
if shutil.which("nvidia-smi"):
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
from sparing.kernels import report
print(report())
assert torch.cuda.is_available(), "PyTorch finds no CUDA device"'
[ "$failed" = 0 ] || seconds=0  # nothing below says anything without a GPU
[ "$earlier" = 0 ] || failed=1

# Compile first, every op in a process of its own, so that the measured run finds its kernels in the cache.
warm() {
  local ops="attention varlen_attention block_sparse_attention few_query_attention window_attention tiny_attention"
  ops="$ops ring_attention_step ln_modulate gate_residual_ln_modulate gate_residual cosine_exit codebook_argmin"
  local code=0 pids="" op pid
  for op in $ops; do
    python3 -m sparing.kernels.bench --suite paper --op "$op" --warm &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid" || code=1; done
  return $code
}
export -f warm
stage warm 90 bash -c warm
stage kernels 200 python3 -m sparing.kernels.bench --suite paper --out "$results" ${compare:+--compare "$compare"}
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
stage tests 90 python3 -m pytest -o addopts= -p no:cacheprovider -q -m gpu "${files[@]}"

# Family benchmarks: those that take --device, --json and --plot.
for script in benchmarks/*.py; do
  grep -q -- '"--device"' "$script" && grep -q -- '"--json"' "$script" && grep -q -- '"--plot"' "$script" || continue
  name="$(basename "$script" .py)"
  case "$name" in
    stvit) limit=60 options=(--dtype bfloat16 --batch 128 --compile) ;;
    stvit_r) limit=60 options=(--dtype bfloat16 --batch 8 --compile) ;;
    flexdit) limit=120 options=(--dtype bfloat16 --batch 16 --guidance --compile) ;;
    *) limit=60 options=() ;;
  esac
  stage "$name" "$limit" python3 "$script" --device cuda "${options[@]}" --json "$results/$name.json" --plot "$results/$name.png"
done

[ "$failed" = 0 ] && echo "all passed" | tee -a "$summary" || echo "something failed: see above" | tee -a "$summary"
archive="$out/sparing-gpu.tar.gz"
tar -C "$results" -czf "$archive" .
if [ "$(stat -c %s "$archive")" -gt $((16 << 20)) ]; then  # keep the numbers, drop what is large
  find "$results" -type f -size +256k ! -name 'kernels.*' -delete
  tar -C "$results" -czf "$archive" .
fi
echo "$archive: $(stat -c %s "$archive") bytes, $((SECONDS - began)) s"
exit "$failed"
