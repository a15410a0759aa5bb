#!/usr/bin/env bash
# Run a command with a Docker engine at hand:   tests/docker_engine.sh COMMAND [ARGUMENT...]
#
# An engine that runs already is used. Else a private one is started (Debian, root) and stopped after the command. Where
# the registry of the base image cannot be reached, a stand-in is made with debootstrap, and the wheels are served to the
# build over loopback. The command finds what it needs in its environment:
#   PT2ONNX_DOCKER_BUILD  options for `docker build`
#   PT2ONNX_DOCKER_SKIP   instead: why there is no engine
# Layers and wheels are kept in PT2ONNX_DOCKER_STATE (default: ~/.cache/pt2onnx-docker; about 9 GB).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
state=${PT2ONNX_DOCKER_STATE:-${XDG_CACHE_HOME:-$HOME/.cache}/pt2onnx-docker}
port=${PT2ONNX_DOCKER_PORT:-18099} # of the wheels; the stand-in's pip.conf names it
python=${PYTHON:-python3.11}
base=$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/Dockerfile")
stand_in=pt2onnx-stand-in:bookworm
started=()
export DEBIAN_FRONTEND=noninteractive

# Tell something; the last thing told is the reason where there is no engine in the end.
say() {
  told=$*
  echo "docker_engine: $told" >&2
}

# End what was started, the last one first; dockerd ends its containers and its containerd itself.
stop_all() {
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do
    kill "${started[i]}" 2>/dev/null && wait "${started[i]}" || :
  done
  ! mountpoint -q "$state/exec/netns/default" 2>/dev/null || umount "$state/exec/netns/default"
}

install() {
  { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; } || { say "$* missing, and no root with apt-get"; return 1; }
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >"$state/apt.log" 2>&1 ||
    { say "apt-get: $(tail -1 "$state/apt.log")"; return 1; }
}

start_engine() {
  [ "$(id -u)" -eq 0 ] || { say "no engine answers, and only root can start one"; return 1; }
  { command -v dockerd && command -v docker; } >/dev/null || install docker.io || return 1
  export DOCKER_HOST=unix://$state/docker.sock
  ! docker info >/dev/null 2>&1 || return 0 # left by a run that was killed
  local free=$(($(df --output=avail -k "$state" | tail -1) / 1000000))
  [ -d "$state/data" ] || [ "$free" -ge 20 ] || { say "$state has $free GB free, the image's build needs 20"; return 1; }
  rm -f "$state/dockerd.pid"
  # No bridge and no firewall rules: containers get no network or the host's, which works inside a container, too.
  dockerd --data-root "$state/data" --exec-root "$state/exec" --pidfile "$state/dockerd.pid" --host "$DOCKER_HOST" \
    --bridge=none --iptables=false --ip6tables=false --ip-forward=false >"$state/dockerd.log" 2>&1 9>&- &
  started+=($!)
  for _ in $(seq 120); do
    kill -0 "${started[-1]}" 2>/dev/null || break
    ! docker info >/dev/null 2>&1 || return 0
    sleep 0.5
  done
  say "dockerd did not start: $(grep -m1 -iE 'failed|error' "$state/dockerd.log" || tail -1 "$state/dockerd.log")"
  return 1
}

# What the base image has: Debian bookworm with Python 3.11 and pip, `python` on the PATH.
make_stand_in() {
  local place folder
  command -v debootstrap >/dev/null || install debootstrap || return 1
  for place in /dev/shm "$state"; do # dpkg waits for the disk after each file, so memory comes first
    folder=$(mktemp -d "$place/rootfs.XXXX") && chmod 755 "$folder" &&
      debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder" \
        >"$state/debootstrap.log" 2>&1 && break
    say "debootstrap: $(tail -1 "$state/debootstrap.log")"
    folder=
  done
  [ -n "$folder" ] || return 1
  chroot "$folder" python3 -m venv /usr/local || return 1
  printf '[global]\nno-index = true\nfind-links = http://127.0.0.1:%s/\n' "$port" >"$folder/etc/pip.conf"
  rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
  tar -C "$folder" -c . | docker import -c 'ENV LANG=C.UTF-8' -c 'CMD ["python3"]' - "$stand_in" >/dev/null || return 1
  rm -rf --one-file-system "$folder"
}

serve_wheels() {
  "$python" -m http.server "$port" --bind 127.0.0.1 -d "$state/wheels" >"$state/http.log" 2>&1 9>&- &
  started+=($!)
  sleep 1
  kill -0 "${started[-1]}" 2>/dev/null || { say "port $port: $(tail -1 "$state/http.log")"; return 1; }
}

prepare() {
  docker info >/dev/null 2>&1 || { start_engine && options=(--network=host); } || return 1
  docker image inspect "$base" >/dev/null 2>&1 || timeout 300 docker pull -q "$base" >/dev/null 2>&1 && return 0
  say "$base cannot be had: a stand-in made of the same Debian release takes its place"
  "$python" -m pip download -qq --only-binary=:all: -d "$state/wheels" -r "$root/requirements.txt" &
  local download=$!
  started+=("$download")
  docker image inspect "$stand_in" >/dev/null 2>&1 || make_stand_in || return 1
  wait "$download" || { say "pip could not download the wheels"; return 1; }
  serve_wheels || return 1
  options=(--network=host --build-arg "BASE_IMAGE=$stand_in")
}

mkdir -p "$state/wheels"
exec 9>"$state/lock"
flock -n 9 || { say "waiting for another run, which uses $state"; flock 9; }
trap stop_all EXIT
options=()
if prepare; then
  PT2ONNX_DOCKER_BUILD="${options[*]}" "$@"
else
  echo "docker_engine: NO DOCKER ENGINE, so the tests of the image are SKIPPED" >&2
  PT2ONNX_DOCKER_SKIP="no Docker engine: $told" "$@"
fi
