#!/usr/bin/env bash
# Sets up .venv-suites: all that .venv has (scripts/setup.sh test), and beside it MindSpore's suites of models.
#
# The suites pin a transformers and a NumPy that vLLM does not work with, so they come without their dependencies, and in
# an environment of their own, which sees the packages of .venv. What pip says goes to .venv-suites/setup.log.
# The environment variables of scripts/setup.sh are understood. A finished set-up is not repeated.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly SUITES=("mindone==0.5.0" "mindformers==1.9.0")
readonly venv=.venv-suites
readonly python="$venv/bin/python" done_file="$venv/.done" log="$venv/setup.log"

scripts/setup.sh test

# What mindformers imports besides.
read -ra needed <<<"$(.venv/bin/python -c 'from vllm_ms_models.suites import mindformers; print(*mindformers.NEEDED)')"
key=$(printf '%s ' "${needed[@]}" | cat - scripts/setup_suites.sh .venv/pyvenv.cfg | sha256sum)
[ "$(cat "$done_file" 2>/dev/null)" != "$key" ] || exit 0

printf 'suites (%s): %s\n' "$venv" "${SUITES[*]}"
rm -rf "$venv"
.venv/bin/python -m venv --without-pip "$venv"
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# A line of a .pth file; unlike a plain path, `addsitedir` also reads the .pth files there (of editable installs).
printf 'import site; site.addsitedir("%s")\n' "$packages" >"$own/base.pth"
# The command of the same name in .venv would start the Python of .venv.
printf '#!%s\nfrom vllm.entrypoints.cli.main import main\n\nmain()\n' "$(realpath -s "$python")" >"$venv/bin/vllm"
chmod +x "$venv/bin/vllm"
if ! "$python" -m pip install --disable-pip-version-check --no-compile --progress-bar off --no-deps "${SUITES[@]}" "${needed[@]}" >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  printf 'set-up failed: could not install %s; check the network, then run this again (all of it: %s)\n' "${SUITES[*]}" "$log" >&2
  exit 1
fi
printf '%s\n' "$key" >"$done_file"
