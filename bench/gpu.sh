#!/usr/bin/env bash
# The GPU's tests and benchmark table, in parts:
#
#     bench/gpu.sh [serve] [transformers]      (default: both, results/h100.md's table)
#                  [startup] [tests] [mesh] [embeddings] [latency] [context] [loading]
#
# MODELS="llama-3.1-8b ..." chooses the configs, REPEAT the runs of each load, LOADS="1 64" some
# of serve's loads and no start-ups, FLAGS="-q fp8" adds to what serve and latency start with. The default took 415 s of an
# H100, tests with empty caches some 400 of two H200s. Everything is written to $OUT
# (default: bench/out). A part that fails does not stop the next; the exit status tells. Weights are
# random; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/out}
REPEAT=${REPEAT:-3}
FLAGS=${FLAGS:-}
MODELS=${MODELS:-"llama-3.1-8b llama-3.2-1b smollm2-135m"}
PYTHON=${PYTHON:-python3}
PORT=${PORT:-8377}
export PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0
seed=0
fail() { echo "FAILED: $*"; status=1; }

# shellcheck disable=SC2206  # words, as a shell splits them
SERVER=(--max-model-len 8192 --max-num-seqs 256 --gpu-memory-utilization 0.9 $FLAGS)

tests() {
  "$PYTHON" bench/gpu_tests.py --out "$OUT/tests" 2>&1 | tee "$OUT/tests.log" | tail -n 60 || fail tests
}

# Several shards: the tests of the runner and of families split over one GPU, or over two, by heads
# and by layers; with two, what they exchange and a step of both beside a step of one
# (results/h200x2.md).
mesh() {
  local devices=cuda:0,cuda:0 count waiting=() stages
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  [ "$count" -gt 1 ] && devices=cuda:0,cuda:1
  for stages in 1 2; do
    for file in tests/runner/test_graphs.py tests/models/test_gpu_families.py; do
      OCTAVO_TEST_MESH=$devices OCTAVO_TEST_STAGES=$stages timeout 300 "$PYTHON" -m pytest -q \
        -p no:cacheprovider --timeout 200 -m gpu $file >"$OUT/mesh-$stages-$(basename $file).log" 2>&1 &
      waiting+=($!)
    done
  done
  timeout 300 "$PYTHON" -m pytest -q -p no:cacheprovider --timeout 200 -m gpu \
    tests/models/test_gpu_shards.py >"$OUT/mesh-shards.log" 2>&1 &
  for process in "${waiting[@]}" $!; do wait "$process" || fail "mesh: $process"; done
  tail -q -n 15 "$OUT"/mesh-*.log
  [ "$count" -gt 1 ] || return 0
  timeout 60 "$PYTHON" bench/exchange.py | tee "$OUT/exchange.md" || fail exchange
  for shards in "" "-tp 2" "-pp 2"; do
    for load in "1 128 128" "64 128 128" "256 128 128" "1 4096 32"; do
      set -- $load
      timeout 90 "$PYTHON" -m octavo bench latency --model bench/configs/llama-3.1-8b \
        --load-format dummy --max-model-len 8192 $shards --batch-size "$1" --input-len "$2" \
        --output-len "$3" --num-iters 2 --repeat "$REPEAT" --markdown "$OUT/mesh.md" \
        --title "llama-3.1-8b ${shards:-on one GPU}: batch $1, $2/$3, in process" \
        || fail "mesh latency $shards $load"
    done
  done
}

# A small encoder beside transformers' own, random weights, in each type.
embeddings() {
  for dtype in bfloat16 float16 float32; do
    timeout 60 "$PYTHON" bench/embeddings.py --device cuda --dtype "$dtype" --random --rounds 30 \
      2>&1 | tee -a "$OUT/embeddings.log" || fail "embeddings $dtype"
  done
}

# One static batch in process, without HTTP, and what its steps' time goes to.
latency() {
  for model in $MODELS; do
    for batch in ${BATCHES:-1 64 256}; do
      timeout 120 "$PYTHON" -m octavo bench latency --model "bench/configs/$model" \
        --load-format dummy --max-model-len 8192 $FLAGS --batch-size "$batch" --input-len 128 \
        --output-len 128 --num-iters 2 --repeat 1 --trace "$OUT/trace-$model-$batch.json" \
        --title "$model${FLAGS:+ $FLAGS}: batch $batch, 128/128, in process" --markdown "$OUT/latency.md" \
        || fail "latency $model $batch"
    done
  done
}

start_server() {
  "$PYTHON" -m octavo.serve "bench/configs/$1" --load-format dummy --port "$PORT" "${SERVER[@]}" \
    >"$OUT/server-$1.log" 2>&1 &
  server=$!
  for _ in $(seq 600); do
    "$PYTHON" - "$PORT" <<'PY' && return 0
import sys, urllib.request
try:
    sys.exit(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/ready", timeout=2).status != 200)
except OSError:
    sys.exit(1)
PY
    kill -0 "$server" 2>/dev/null || break
    sleep 0.3
  done
  tail -n 40 "$OUT/server-$1.log"
  return 1
}

stop_server() {
  kill "$server" 2>/dev/null
  wait "$server" 2>/dev/null
  grep -v '" 200' "$OUT/server-$1.log" | tail -n 20
}

# load MODEL NAME ARGUMENTS...
load() {
  local model=$1 name=$2
  shift 2
  # Prompts no other load has sent: the prefix cache must not answer.
  seed=$((seed + 100))
  timeout 300 "$PYTHON" -m octavo bench serve --seed "$seed" --base-url "http://127.0.0.1:$PORT" \
    --repeat "$REPEAT" --num-processes 8 --title "$model${FLAGS:+ $FLAGS}: $name" --markdown "$OUT/serve.md" \
    --json "$OUT/serve-$model.${name//[^a-z0-9]/-}.json" "$@" || fail "$model $name"
}

# The start with an empty kernel cache comes first; the loads' own server is the start with a warm one.
serve() {
  export TRITON_CACHE_DIR="$OUT/triton-cache"
  for model in $MODELS; do
    [ -z "${LOADS:-}" ] && startups "$model" empty 1
    if start_server "$model"; then
      echo "$model: start-up, warm kernel cache: $(grep "^ready in" "$OUT/server-$model.log")" \
        | tee -a "$OUT/startup.md"
      for name in ${LOADS:-1 8 64 256 burst long}; do "load_$name" "$model"; done
    else
      fail "$model did not start"
    fi
    stop_server "$model"
  done
}

# streams MODEL COUNT REQUESTS INPUT OUTPUT
streams() { load "$1" "$4/$5 c=$2" --concurrency "$2" --num-requests "$3" --input-len "$4" --output-len "$5"; }
load_1() { streams "$1" 1 12 128 128; }
load_8() { streams "$1" 8 32 512 256; }
load_64() { streams "$1" 64 256 512 256; }
load_256() { streams "$1" 256 768 512 256; }
load_burst() {
  load "$1" "220/200 all at once" --concurrency 1000 --num-requests 1000 --input-len 220 --output-len 200 \
    --len-spread 0.8
}
load_long() { if [ "$1" = llama-3.1-8b ]; then streams "$1" 16 48 4096 128; fi; }

# What a token of context costs a step of one request.
context() {
  for length in 1024 8000 32000; do
    timeout 90 "$PYTHON" -m octavo bench latency --model bench/configs/llama-3.1-8b \
      --load-format dummy --max-model-len 33000 --batch-size 1 --input-len "$length" \
      --output-len 64 --num-iters 1 --repeat "$REPEAT" --markdown "$OUT/context.md" \
      --title "llama-3.1-8b: batch 1, $length tokens of context, in process" \
      || fail "context $length"
  done
}

# startups MODEL empty|warm REPEAT: from the process to ready, and what of it is the import of torch.
startups() {
  [ "$2" = empty ] && rm -rf "$TRITON_CACHE_DIR"
  timeout 200 "$PYTHON" -m octavo bench startup --repeat "$3" \
    --serve-args "bench/configs/$1 --load-format dummy ${SERVER[*]}" \
    --title "$1: start-up, $2 kernel cache" --markdown "$OUT/startup.md" || fail "startup $1 $2"
}

# The first start finds no compiled kernels, those after it do.
startup() {
  export TRITON_CACHE_DIR="$OUT/triton-cache"
  for model in $MODELS; do
    [ -z "${LOADS:-}" ] && startups "$model" empty 1
    startups "$model" warm "$REPEAT"
  done
}

# Weights from the disk, beside what plain reads of it give.
loading() {
  timeout 240 "$PYTHON" bench/load.py "$OUT/checkpoint" --size "${LOAD_SIZE:-16g}" \
    --repeat "$REPEAT" 2>&1 | tee "$OUT/loading.log" || fail loading
  rm -rf "$OUT/checkpoint"
}

# What generate() of transformers does with the same weights on the same GPU.
transformers() {
  timeout 200 "$PYTHON" - <<'PY' 2>&1 | tee "$OUT/transformers.log" || fail transformers
import time, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained("bench/configs/llama-3.1-8b")
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config).eval()
for batch, prompt, output in ((1, 128, 64), (32, 512, 128)):
    ids = torch.randint(100, 32000, (batch, prompt), device="cuda")
    for measured in (False, True):
        torch.cuda.synchronize(); start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=output if measured else 4, min_new_tokens=output if measured else 4, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize(); seconds = time.perf_counter() - start
    print(f"transformers generate, 8B, batch {batch}, {prompt}/{output}: {batch * output / seconds:.1f} tok/s")
PY
}

"$PYTHON" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
for part in "${@:-serve transformers}"; do
  for name in $part; do
    echo "=== $name ($(date +%T))"
    "$name"
  done
done
rm -rf "$OUT/triton-cache"
exit $status
