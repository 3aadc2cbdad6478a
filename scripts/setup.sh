#!/usr/bin/env bash
# Sets up .venv with everything `vllm serve` needs: torch, vLLM's device-less build, MindSpore, this package, its kernels.
#
#   scripts/setup.sh               to serve
#   scripts/setup.sh test lint     and extras of pyproject.toml: vision, test, test-weights, lint, bench, ray
#
# A finished set-up is not repeated; an interrupted one is taken up where it stopped. What pip says goes to .venv/setup.log.
#
#   PYTHON            interpreter to use (default: the first Python 3.11 or 3.12 found)
#   TORCH_INDEX_URL   another package index to look for torch on. The default index may offer only the CUDA build of
#                     torch, gigabytes larger and of no use here; PyTorch's own index of CPU wheels has the small one.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # every start of the server would compile thousands of modules again
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)

readonly TORCH=2.13.0 VLLM=0.32.0 MINDSPORE=2.10.0 NEEDED_GB=8
readonly venv="$root/.venv" steps=7
readonly python="$venv/bin/python" state="$venv/.setup" log="$venv/setup.log"

say() { printf '%s\n' "$*"; }
fail() {
  printf 'set-up failed: %s\n' "$*" >&2
  exit 1
}
step() { say "[$1/$steps] $2"; }

# logged REMEDY COMMAND...: runs the command into the log; when it fails, shows the end of what it said and the remedy.
logged() {
  local remedy=$1 start
  shift
  printf '\n$ %s\n' "$*" >>"$log"
  start=$(wc -l <"$log")
  "$@" >>"$log" 2>&1 && return
  tail -n "+$((start + 1))" "$log" | tail -n 15 >&2
  fail "$remedy (all of it: .venv/setup.log)"
}

# pip without byte-compiling, which takes longer than installing: `warm_up` compiles the modules that are used.
pip_install() {
  local remedy=$1
  shift
  logged "$remedy" "$python" -m pip install --disable-pip-version-check --no-compile --progress-bar off "$@"
}

# has NAME VERSION: is that version installed? 2.13.0 also matches 2.13.0+cpu.
has() {
  "$python" - "$1" "$2" <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    sys.exit(version(sys.argv[1]).split("+")[0] != sys.argv[2])
except PackageNotFoundError:
    sys.exit(1)
END
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
  local candidate candidates=(python3.11 python3.12 python3 python)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    supported "$candidate" && say "$candidate" && return
  done
  fail "no Python 3.11 or 3.12 found${PYTHON:+ at $PYTHON}; install one (Debian, Ubuntu: apt install python3.11" \
    "python3.11-venv python3.11-dev) or name it: PYTHON=/path/to/python3.11"
}

# What a finished set-up was made from, kept per extra: `done_already test` asks whether the extra `test` is there.
key() { cat pyproject.toml scripts/setup.sh | sha256sum; }
done_already() { [ "$(cat "$state/done-$1" 2>/dev/null)" = "$(key)" ]; }
mark_done() { key >"$state/done-$1"; }

make_venv() {
  local base made_for free_gb
  if "$python" -m pip --version >/dev/null 2>&1; then
    supported "$python" || fail "the Python in .venv is neither 3.11 nor 3.12; remove it and try again: rm -rf .venv"
    made_for=$(sed -n 's|^command = .* -m venv [^/]*||p' "$venv/pyvenv.cfg")
    [ -z "$made_for" ] || [ "$made_for" -ef "$venv" ] ||
      fail ".venv was made in another folder, $made_for, and cannot be moved; remove it and try again: rm -rf .venv"
  else
    [ ! -e "$venv" ] || [ -d "$state" ] || fail "the .venv here has no working pip; remove it and try again: rm -rf .venv"
    base=$(find_python)
    free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gb" -ge "$NEEDED_GB" ] || fail "$free_gb GB free in $root, $NEEDED_GB GB needed; make room and try again"
    rm -rf "$venv" && mkdir -p "$state"
    logged "could not create .venv; on Debian and Ubuntu: apt install python3-venv" "$base" -m venv "$venv"
  fi
  mkdir -p "$state"
  pip_install "could not upgrade pip; check the network, then run this again" "pip>=25"
}

# What an interrupted pip leaves: a package that looks installed but has no list of its files.
drop_half_installed() {
  local info
  for info in "$venv"/lib/python3.*/site-packages/*.dist-info; do
    [ -d "$info" ] && [ ! -e "$info/RECORD" ] && rm -rf "$info"
  done
  return 0
}

install_torch() {
  local index=()
  [ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")
  pip_install "could not install torch $TORCH; check the network, then run this again" "${index[@]}" "torch==$TORCH"
}

# Built from the source distribution without device code; the wheel on package indexes is the CUDA build.
# Without isolation the build uses the torch of .venv instead of installing a second one. CARGO=false leaves out an
# optional front end in Rust, which takes long to compile.
build_vllm() {
  compgen -G "$state/vllm-$VLLM-*.whl" >/dev/null && return
  pip_install "could not install what building vLLM takes; check the network, then run this again" \
    "setuptools>=78.1.1,<81" "setuptools-scm>=8" "setuptools-rust>=1.9" "packaging>=24.2" wheel jinja2
  logged "could not build vLLM $VLLM; check the network, then run this again" \
    env VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE="$VLLM" CARGO=false \
    "$python" -m pip wheel --disable-pip-version-check --progress-bar off --no-deps --no-build-isolation \
    --no-binary=vllm --wheel-dir "$state" "vllm==$VLLM"
}

install_mindspore() {
  pip_install "could not install MindSpore $MINDSPORE; check the network, then run this again" \
    --no-deps "mindspore==$MINDSPORE"
}

# install_package EXTRA...: this package and all that is still missing, in one resolution.
install_package() {
  local extras wheels=()
  extras=$(IFS=,; echo "$*")
  has vllm "$VLLM" || wheels=("$state/vllm-$VLLM-"*.whl)
  pip_install "could not install vllm_ms_models; run this again" --no-build-isolation \
    "${wheels[@]}" --editable ".${extras:+[$extras]}"
  "$python" -m pip check >>"$log" 2>&1 || say "      warning: pip check complains, see .venv/setup.log"
  compgen -G "$venv/lib/python3.*/site-packages/nvidia*" >/dev/null &&
    say "      note: this torch is the CUDA build; it works, TORCH_INDEX_URL (see scripts/setup.sh) gets the smaller one"
  return 0
}

# Imports what a server imports, so that its modules are compiled before the first start.
warm_up() {
  "$python" -c "import mindspore" >>"$log" 2>&1 &
  local mindspore=$!
  logged "vLLM was installed but cannot be imported; remove .venv and run this again" \
    "$python" -c "import vllm.entrypoints.cli.main, vllm.entrypoints.openai.api_server, vllm.v1.worker.gpu_worker"
  wait "$mindspore" || fail "MindSpore was installed but cannot be imported (reason: .venv/setup.log)"
}

build_kernels() {
  PATH="$venv/bin:$PATH" "$python" -m vllm_ms_models.kernels.cpu ||
    say "      warning: the C++ kernels were not built (reason above); the slow reference kernels will serve"
}

main() {
  local extra missing=()
  for extra in "$@"; do
    case $extra in
      vision | test | test-weights | lint | bench | ray) done_already "$extra" || missing+=("$extra") ;;
      *) fail "unknown extra '$extra'; there are vision, test, test-weights, lint, bench and ray" ;;
    esac
  done
  if done_already serve && [ ${#missing[@]} -eq 0 ]; then return; fi

  SECONDS=0
  step 1 "virtual environment (.venv)"
  make_venv
  drop_half_installed
  step 2 "torch $TORCH"
  has torch "$TORCH" || install_torch
  step 3 "vLLM $VLLM, built without device code"
  has vllm "$VLLM" || build_vllm
  step 4 "MindSpore $MINDSPORE (800 MB)"
  has mindspore "$MINDSPORE" || install_mindspore
  step 5 "vllm_ms_models${missing[*]:+ with what is needed for: ${missing[*]}}"
  install_package "${missing[@]}"
  step 6 "compiling Python modules"
  done_already serve || warm_up
  step 7 "C++ kernels"
  build_kernels

  rm -f "$state"/vllm-*.whl
  for extra in serve "${missing[@]}"; do mark_done "$extra"; done
  say "set-up done in $SECONDS s"
}

exec 9<scripts/setup.sh
flock 9 # one set-up at a time
main "$@"
