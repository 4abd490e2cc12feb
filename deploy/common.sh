# shellcheck shell=bash
# What the scripts of deploy/ and .ci/ share. Sourced, not run.
#
# Environment:
#   PYRAMID_CACHE          where LibTorch is kept (default ${XDG_CACHE_HOME:-~/.cache}/pyramid)
#   LIBTORCH_DIR           an existing LibTorch 2.11 to use instead
#   PYRAMID_SKIP_PACKAGES  1: install no Debian packages, take what is there (any distribution)
#   PYRAMID_JOBS           compilers at once (default: one a core, and one for each 2 GB of memory)
set -euo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly cache=${PYRAMID_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set; set HOME or PYRAMID_CACHE}/.cache}/pyramid}
readonly libtorch_version=2.11.0
readonly libtorch_dir=${LIBTORCH_DIR:-$cache/libtorch-$libtorch_version}
readonly build_dir=$root/build

say() { printf '%s\n' "$*" >&2; }
die() {
  printf '\n%s: %s\n' "$(basename "$0")" "$1" >&2
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
  exit 1
}

# step NAME: what follows is the step NAME; the one before it is done. step_seconds[NAME] is its time.
declare -A step_seconds=()
current_step=
step_start=0
end_step() {
  [ -n "$current_step" ] || return 0
  step_seconds[$current_step]=$((SECONDS - step_start))
  say "    $current_step: ${step_seconds[$current_step]} s"
  current_step=
}
step() {
  end_step
  current_step=$1
  step_start=$SECONDS
  say "==> $1"
}

# Names of the packages of SECTION…
packages_of() {
  local section
  for section in "$@"; do
    sed -n "/^\[$section\]/,/^\[/p" "$root/deploy/packages.txt" | sed -e '/^\[/d' -e 's/[[:space:]]*#.*//' -e '/^$/d'
  done
}

# Those of SECTION… that aren't installed.
missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' 2>/dev/null | sed -n 's/^installed //p')
  packages_of "$@" | grep -vxFf <(printf '%s\n' "$installed") || true
}

check_machine() {
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    die "this machine is $(uname -s) $(uname -m); the LibTorch this build uses is for Linux on x86-64"
  [ "${PYRAMID_SKIP_PACKAGES:-}" != 1 ] || return 0
  local id='' version_id='' pretty='an unknown system'
  if [ -r /etc/os-release ]; then
    id=$(. /etc/os-release && echo "${ID:-}")
    version_id=$(. /etc/os-release && echo "${VERSION_ID:-}")
    pretty=$(. /etc/os-release && echo "${PRETTY_NAME:-$ID}")
  fi
  [ "$id $version_id" = "debian 12" ] ||
    die "the set-up installs Debian 12 packages, and this is $pretty" \
      "Run it in a Debian 12 container (deploy/Dockerfile), or install the libraries of deploy/packages.txt yourself and set" \
      "PYRAMID_SKIP_PACKAGES=1."
}

# need_disk PATH MB …: fails unless each file system has room for everything that goes to it.
need_disk() {
  local -A wanted=() paths=() free=()
  local path existing device
  while [ $# -gt 0 ]; do
    path=$1
    existing=$path
    while [ ! -e "$existing" ]; do existing=$(dirname "$existing"); done
    device=$(stat -c %d "$existing")
    wanted[$device]=$((${wanted[$device]:-0} + $2))
    [ "$2" -eq 0 ] || paths[$device]="${paths[$device]:-} $path"
    free[$device]=$(df -Pm "$existing" | awk 'NR == 2 { print $4 }')
    shift 2
  done
  for device in "${!wanted[@]}"; do
    [ "${free[$device]}" -ge "${wanted[$device]}" ] ||
      die "not enough disk space: ${wanted[$device]} MB are needed for${paths[$device]}, ${free[$device]} MB are free" \
        "Free some, move the checkout, or point PYRAMID_CACHE to another disk."
  done
}

# Room for everything the set-up is about to write: packages, LibTorch, the build.
check_disk() {
  local packages=0 libtorch=0 build=300
  [ "${PYRAMID_SKIP_PACKAGES:-}" = 1 ] || [ -z "$(missing_packages build)" ] || packages=2000
  [ -e "$libtorch_dir/lib/libtorch_cpu.so" ] || libtorch=1700
  [ -e "$build_dir/bin/pyramid-server" ] || build=1500
  need_disk /usr "$packages" "$cache" "$libtorch" "$root" "$build"
}

# Installs what is missing of SECTION…. Services that a package brings are not started: the tests start their own.
install_packages() {
  [ "${PYRAMID_SKIP_PACKAGES:-}" != 1 ] || return 0
  local -a missing
  local log policy=/usr/sbin/policy-rc.d
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -eq 0 ] ||
    die "${#missing[@]} Debian packages are missing, and installing them needs root. Run this once, then start again:" \
      "sudo apt-get install --no-install-recommends ${missing[*]}"
  say "    installing ${#missing[@]} Debian packages: ${missing[*]}"
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  if ! apt-get update >"$log" 2>&1 || grep -qE '^(E:|W: Failed to fetch)' "$log"; then
    tail -5 "$log" >&2
    die "apt-get update failed (see above); is there a network?" "Missing packages: ${missing[*]}"
  fi
  (
    if [ ! -e "$policy" ]; then
      trap 'rm -f "$policy"' EXIT
      printf '#!/bin/sh\nexit 101\n' >"$policy"
      chmod +x "$policy"
    fi
    apt-get install -y --no-install-recommends "${missing[@]}" >"$log" 2>&1
  ) || { tail -15 "$log" >&2; die "apt-get install failed (see above, and $log)"; }
  if [ -d /run/systemd/system ] && printf '%s\n' "${missing[@]}" | grep -qx prometheus; then
    systemctl disable -q prometheus || true
  fi
  rm -f "$log"
}

build_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/^MemAvailable/ { print int($2 / 2000000) }' /proc/meminfo)
  [ "$memory" -ge 1 ] || memory=1
  echo "${PYRAMID_JOBS:-$((cores < memory ? cores : memory))}"
}

# configure: preset release in build/. Repeats quickly.
configure() {
  local log=$build_dir/configure.log
  mkdir -p "$build_dir"
  (cd "$root" && cmake --preset release -DLIBTORCH_DIR="$libtorch_dir") >"$log" 2>&1 || { cat "$log" >&2; die "cmake failed (see above)"; }
}

# build TARGET…: with ninja's own progress.
build() {
  NINJA_STATUS='    [%f/%t, %es] ' ninja -C "$build_dir" -j "$(build_jobs)" "$@" >&2 || die "the build failed (see above)"
}

# json PATH: the value at PATH ("job.progress.loss", "models.0.version") of the JSON object on standard input; empty if it isn't there.
# Of several lines the last that is an object counts. job_id and jobId are the same key.
json() {
  python3 -c '
import json, sys
text, value = sys.stdin.read(), None
try:
    value = json.loads(text)
except ValueError:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            pass
for key in sys.argv[1].split("."):
    if isinstance(value, list) and key.isdigit():
        value = value[int(key)] if int(key) < len(value) else None
    elif isinstance(value, dict):
        value = {k.replace("_", "").lower(): v for k, v in value.items()}.get(key.replace("_", "").lower())
    else:
        value = None
print("" if value is None else value if not isinstance(value, (dict, list)) else json.dumps(value))
' "$1"
}
