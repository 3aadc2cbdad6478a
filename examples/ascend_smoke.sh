#!/usr/bin/env bash
# The first things to run on Ascend hardware, in order, and a report to send back (docs/ascend.md). Not run on hardware.
#
#   examples/ascend_smoke.sh                        everything; the report is ascend_report.txt
#   examples/ascend_smoke.sh --only operators       some steps, by their names below, with commas between
#   examples/ascend_smoke.sh --model DIR            serves that checkpoint in place of a tiny one with random weights
#   examples/ascend_smoke.sh --report FILE --work DIR --timeout SECONDS
#
# Each step prints PASS, FAIL or SKIP; the report also has the end of what it said. Without an Ascend device, the steps
# that need one are skipped. --work keeps logs, checkpoints and answers in DIR; --timeout is for the start of a server
# (900), which compiles. Nothing is asked for and nothing is sent. Host and user names, addresses and whatever looks like
# a secret are replaced in the report; read it before you send it all the same. Servers listen on 127.0.0.1 only, and
# whatever was started has ended at the end. The exit code is 1 if a step failed.
# shellcheck disable=SC2317 # steps are called by their names
set -u
export LC_ALL=C HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TQDM_DISABLE=1
unset PYTHONDONTWRITEBYTECODE

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly here helper="$here/ascend_smoke.py" skipped=77 lines_of_a_log=90
readonly steps=(environment device operators collectives checkpoint serve-cpu serve-ascend graphs two-devices two-devices-graphs w8a8 timing)
only="" model="" report=ascend_report.txt work="" start_timeout=900
child="" server="" port="" devices=0 failed=0 keep_work=yes

say() { printf '%s\n' "$*"; }
refuse() {
  printf '%s\n' "$*" >&2
  exit 2
}

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h)
        sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --only | --model | --report | --work | --timeout)
        [ $# -ge 2 ] || refuse "$1 needs a value; see --help."
        case $1 in
          --only) only=$2 ;;
          --model) model=$2 ;;
          --report) report=$2 ;;
          --work) work=$2 ;;
          --timeout) start_timeout=$2 ;;
        esac
        shift 2
        ;;
      *) refuse "$1 is not an option; see --help." ;;
    esac
  done
  local name
  for name in ${only//,/ }; do
    [[ " ${steps[*]} " == *" $name "* ]] || refuse "$name is not a step; there are ${steps[*]}."
  done
  [[ $start_timeout =~ ^[0-9]+$ ]] || refuse "--timeout $start_timeout is not a number of seconds."
  [ -z "$model" ] || [ -e "$model/config.json" ] || refuse "--model $model has no config.json."
  for name in python vllm curl timeout setsid; do
    command -v "$name" >/dev/null || refuse "There is no $name on the PATH; activate the environment first."
  done
}

# --- processes -----------------------------------------------------------------------------------------------------

# limited SECONDS COMMAND...: in the background, so that Ctrl-C ends it as well.
limited() {
  local seconds=$1 code
  shift
  timeout --kill-after=10 "$seconds" "$@" &
  child=$!
  wait "$child"
  code=$?
  child=""
  [ "$code" -ne 124 ] || say "ended after $seconds s without an answer"
  return "$code"
}

stop_server() {
  local pid=$server left
  [ -n "$pid" ] || return 0
  server=""
  kill -TERM "$pid" 2>/dev/null
  for left in {60..1}; do
    kill -0 "$pid" 2>/dev/null || break
    [ "$left" -gt 1 ] || say "the server did not end within 30 s of being told to"
    sleep 0.5
  done
  kill -KILL -- "-$pid" 2>/dev/null # it leads a group of its own: its workers, if they were left behind
  wait "$pid" 2>/dev/null
  return 0
}

clean_up() {
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
  stop_server
  [ "$keep_work" = yes ] || rm -rf "$work"
}

# start_server NAME DEVICE CHECKPOINT OPTION...: returns once it is healthy.
start_server() {
  local name=$1 device=$2 checkpoint=$3 log="$work/$1/server.log" end=$((SECONDS + start_timeout))
  shift 3
  port=$(python "$helper" port) || return 1
  say "VLLM_MS_DEVICE=$device vllm serve $checkpoint $*"
  VLLM_MS_DEVICE=$device setsid vllm serve "$checkpoint" --host 127.0.0.1 --port "$port" --served-model-name smoke \
    "$@" >"$log" 2>&1 &
  server=$!
  until curl --silent --noproxy '*' --max-time 5 --output /dev/null --fail "http://127.0.0.1:$port/health"; do
    if ! kill -0 "$server" 2>/dev/null; then
      wait "$server"
      say "vllm serve ended with $?"
      server=""
      tail -n 25 "$log"
      return 1
    fi
    if [ "$SECONDS" -ge "$end" ]; then
      say "not healthy after $start_timeout s"
      tail -n 25 "$log"
      return 1
    fi
    sleep 0.5
  done
  grep -h "MindSpore .* kernels:" "$log" | tail -n 1
  say "healthy after $((SECONDS - end + start_timeout)) s"
}

# ask BODY ANSWER: a completion by HTTP.
ask() {
  local code
  code=$(curl --silent --show-error --noproxy '*' --max-time 300 --header 'Content-Type: application/json' \
    --data "@$1" --output "$2" --write-out '%{http_code}' "http://127.0.0.1:$port/v1/completions")
  [ "$code" = 200 ] || {
    say "answered with $code: $(head -c 500 "$2" 2>/dev/null)"
    return 1
  }
}

# tokens_a_second REQUESTS TOKENS: that many requests of that many tokens at once.
measure() {
  local requests=$1 tokens=$2 body="$work/requests/timing.json" begin pids=() number
  begin=$EPOCHREALTIME
  for ((number = 0; number < requests; number++)); do
    ask "$body" "$work/timing_$number.json" &
    pids+=($!)
  done
  for number in "${pids[@]}"; do wait "$number" || return 1; done
  awk -v b="$begin" -v e="$EPOCHREALTIME" -v n="$requests" -v t="$tokens" \
    'BEGIN { printf "%d at once: %.1f tokens a second (%d each, %.2f s)\n", n, n * t / (e - b), t, e - b }'
}

# serve_and_ask NAME DEVICE CHECKPOINT OPTION...: answers go to $work/NAME, what was measured to NAME/timing.txt.
serve_and_ask() {
  local name=$1 body
  mkdir -p "$work/$name"
  start_server "$@" || return 1
  for body in "$work"/requests/prompt_*.json; do
    ask "$body" "$work/$name/$(basename "$body")" || return 1
  done
  measure 1 64 >/dev/null || return 1 # the first batches of a shape may compile
  measure 8 64 >/dev/null || return 1
  { measure 1 64 && measure 8 64; } >"$work/$name/timing.txt" || return 1
  cat "$work/$name/timing.txt"
  stop_server
}

# --- steps ---------------------------------------------------------------------------------------------------------
# A step returns 0 (PASS), 77 (SKIP; the last line it said is why) or anything else (FAIL).

# How many Ascend devices a server may use here; ASCEND_SMOKE_DEVICES is for the script's own test.
count_devices() {
  devices=${ASCEND_SMOKE_DEVICES:-$(python -c 'from vllm_ms_models import devices; print(len(devices.visible()))' 2>/dev/null)}
  devices=${devices:-0}
}

needs_devices() {
  [ "$devices" -ge "$1" ] && return
  if [ "$1" -eq 1 ]; then say "this host has no Ascend device"; else say "this host has no $1 Ascend devices"; fi
  return "$skipped"
}

needs_file() {
  [ -e "$work/$1" ] && return
  say "the step $2 has not passed"
  return "$skipped"
}

# the checkpoint that servers are started with
checkpoint_folder() {
  if [ -n "$model" ]; then say "$model"; else say "$work/checkpoint"; fi
}

show_file() {
  [ -r "$1" ] || return 0
  say "-- $1"
  head -n 12 "$1"
}

step_environment() {
  local home=${ASCEND_HOME_PATH:-/usr/local/Ascend/ascend-toolkit/latest} file
  uname -srm
  sed -n 's/^PRETTY_NAME=//p' /etc/os-release 2>/dev/null
  if command -v npu-smi >/dev/null; then limited 60 npu-smi info; else say "no npu-smi on the PATH"; fi
  for file in /usr/local/Ascend/driver/version.info /usr/local/Ascend/firmware/version.info \
    "$home/compiler/version.info" "$home/version.cfg"; do
    show_file "$file"
  done
  env | grep -E '^(ASCEND|HCCL|GLOO|MS|VLLM|OMP|RANK)_' | grep -viE 'key|token|secret|password' | sort
  say "-- vllm-ms doctor"
  limited 300 python -m vllm_ms_models.cli doctor
}

step_device() {
  needs_devices 1 || return
  limited 600 python "$helper" device
}

step_operators() {
  limited 3600 python -m vllm_ms_models.kernels.ascend.selfcheck || return 1
  needs_devices 1
}

step_collectives() {
  needs_devices 2 || return
  limited 600 python "$helper" collectives
}

step_checkpoint() {
  mkdir -p "$work/requests"
  limited 60 python "$helper" requests "$work/requests" "$(checkpoint_folder)" || return 1
  [ -z "$model" ] || return 0
  limited 300 python "$helper" checkpoint "$work/checkpoint.part" && mv "$work/checkpoint.part" "$work/checkpoint"
}

step_serve-cpu() {
  needs_file requests/timing.json checkpoint || return
  serve_and_ask cpu cpu "$(checkpoint_folder)" --max-model-len 1024
}

# on_ascend NAME CHECKPOINT OTHER OPTION...: served there; the answers must be those in $work/OTHER.
on_ascend() {
  local name=$1 checkpoint=$2 other=$3
  shift 3
  serve_and_ask "$name" ascend "$checkpoint" --max-model-len 1024 "$@" || return 1
  python "$helper" compare "$work/$name" "$work/$other"
}

step_serve-ascend() {
  needs_devices 1 || return
  needs_file cpu/timing.txt serve-cpu || return
  on_ascend ascend "$(checkpoint_folder)" cpu --enforce-eager
}

step_graphs() {
  needs_devices 1 || return
  needs_file cpu/timing.txt serve-cpu || return
  on_ascend graphs "$(checkpoint_folder)" cpu
}

step_two-devices() {
  needs_devices 2 || return
  needs_file cpu/timing.txt serve-cpu || return
  on_ascend two "$(checkpoint_folder)" cpu --tensor-parallel-size 2 --enforce-eager
}

step_two-devices-graphs() {
  needs_devices 2 || return
  needs_file cpu/timing.txt serve-cpu || return
  on_ascend two-graphs "$(checkpoint_folder)" cpu --tensor-parallel-size 2
}

step_w8a8() {
  needs_devices 1 || return
  needs_file requests/timing.json checkpoint || return
  limited 3600 python -m vllm_ms_models.cli quantize "$(checkpoint_folder)" "$work/w8a8" --scheme w8a8-dynamic || return 1
  serve_and_ask w8a8-cpu cpu "$work/w8a8" --max-model-len 1024 || return 1
  on_ascend w8a8-ascend "$work/w8a8" w8a8-cpu --enforce-eager
}

step_timing() {
  local file found=no
  for file in "$work"/*/timing.txt; do
    [ -e "$file" ] || continue
    found=yes
    sed "s|^|$(basename "$(dirname "$file")"): |" "$file"
  done
  [ "$found" = yes ] && return
  say "no server has answered"
  return "$skipped"
}

# --- report --------------------------------------------------------------------------------------------------------

# why LOG: the last error that Python raised in it, or else the last line.
why() {
  grep -E '^[A-Za-z_.]*(Error|Exception): ' "$1" | tail -n 1 | grep . || grep . "$1" | tail -n 1
}

# run_step NAME: its line on the terminal, and its part of the report.
run_step() {
  local name=$1 log="$work/$1.log" begin=$SECONDS code status reason=""
  if [ -n "$only" ] && [[ ",$only," != *",$name,"* ]]; then return; fi
  "step_$name" >"$log" 2>&1
  code=$?
  stop_server >>"$log" 2>&1
  case $code in
    0) status=PASS ;;
    "$skipped") status=SKIP ;;
    *) status=FAIL failed=1 ;;
  esac
  [ "$status" = PASS ] || reason=" ($(why "$log" | python "$helper" hide | cut -c 1-160))"
  say "$status  $name$reason, $((SECONDS - begin)) s" | tee -a "$work/summary"
  {
    printf '\n=== %s: %s\n' "$name" "$status"
    tail -n "$lines_of_a_log" "$log"
  } >>"$work/details"
}

write_report() {
  {
    say "vllm-ms-models on Ascend, $(date -u '+%Y-%m-%d %H:%M') UTC, Ascend devices: $devices"
    cat "$work/summary" "$work/details" 2>/dev/null
  } | python "$helper" hide >"$report"
}

main() {
  local name
  read_options "$@"
  if [ -z "$work" ]; then
    work=$(mktemp -d) && keep_work=no
  fi
  mkdir -p "$work" || refuse "--work $work cannot be made."
  { : >"$work/summary" && : >"$work/details"; } || refuse "--work $work cannot be written to."
  : >"$report" || refuse "--report $report cannot be written."
  trap clean_up EXIT
  trap 'write_report; exit 130' INT TERM
  count_devices
  for name in "${steps[@]}"; do run_step "$name"; done
  write_report
  say "report: $report"
  exit "$failed"
}

main "$@"
