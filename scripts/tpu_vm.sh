#!/usr/bin/env bash
# Rents a Cloud TPU VM, trains on all of its workers, brings the results home, gives it back.
# docs/tpu_vm.md goes through it line by line. Also for the bash 3.2 of macOS.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_vm.sh COMMAND [options]

commands:
  create --type TYPE [--spot] [--queued] [--valid-for TIME] [--runtime-version NAME]
                                   rent a TPU, such as v5litepod-8, or --slices of it; --queued waits in line for it
  install [--git URL] [--ref REF]  this clone's commit REF (default: HEAD), or that of a repository, on all workers
  upload LOCAL REMOTE              a file or folder to all workers
  mount BUCKET                     a Cloud Storage bucket at ~/bucket on all workers
  train [ARGUMENT ...]             phi3-jax train with these arguments on all workers, in the background
  run COMMAND [ARGUMENT ...]       any program of the installation, such as phi3-jax, on all workers, waited for
  status                           of the TPU, and of the run on each worker
  logs [--slice N] [--worker N] [--follow]
                                   the run's output on a worker (default: the first)
  stop                             end the run on all workers, once it has saved a checkpoint
  fetch REMOTE LOCAL               a file or folder of worker 0 into the folder LOCAL
  delete [--queued] [--yes]        give the TPU back, with everything on its disks

options of every command, before its arguments:
  --name NAME, --zone ZONE, --project ID   default: the variables TPU_NAME, TPU_ZONE and TPU_PROJECT; without a
                                           project, gcloud's own
  --slices NUMBER                          TPUs that train together; default: the variable TPU_SLICES, or 1
  --dry-run                                print the commands and run nothing

Remote paths are relative to ~/phi3_jax. Exit status 2: the arguments are wrong.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
slices=${TPU_SLICES:-1}
dry_run=false queued=false yes=false spot='' follow=''
type='' runtime='' valid_for='' git_url='' ref='' worker=0 slice=0
arguments=()

die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

quote() { # one word for a shell: as it is where that is safe, else in single quotes
  case $1 in
    '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

quote_all() {
  local word text=''
  for word in "$@"; do text+="${text:+ }$(quote "$word")"; done
  printf '%s' "$text"
}

run() { # runs a command, or prints it
  if $dry_run; then
    quote_all "$@"
    echo
  else
    "$@"
  fi
}

gcloud_tpu() { # gcloud_tpu GROUP VERB [ARGUMENT ...]
  local group=$1 verb=$2
  shift 2
  run gcloud compute tpus "$group" "$verb" "$@" "--zone=$zone" ${project:+"--project=$project"}
}

nodes() { # the names of the slices: that of the one, or numbered from 0
  local number
  if [ "$slices" -eq 1 ]; then
    echo "$name"
  else
    for ((number = 0; number < slices; number++)); do echo "$name-$number"; done
  fi
}

node() { # node NUMBER: the name of a slice
  nodes | sed -n "$(($1 + 1))p"
}

on_workers() { # on_workers SCRIPT: on all of every slice, at once, since they may wait for each other
  local each started=() failed=false
  for each in $(nodes); do
    if $dry_run || [ "$slices" -eq 1 ]; then
      gcloud_tpu tpu-vm ssh "$each" --worker=all "--command=$1"
    else
      gcloud_tpu tpu-vm ssh "$each" --worker=all "--command=$1" </dev/null &
      started+=($!)
    fi
  done
  # bash 3.2 takes an empty array for a variable that is not set.
  for each in ${started[@]+"${started[@]}"}; do wait "$each" || failed=true; done
  if $failed; then return 1; fi
}

copy_to_workers() { # copy_to_workers LOCAL PATH [OPTION]: to all of every slice
  local each
  for each in $(nodes); do gcloud_tpu tpu-vm scp ${3:+"$3"} "$1" "$each:$2" --worker=all; done
}

remote() { # a path on the TPU, for its shell
  case $1 in
    \~/*) printf '%s' "\$HOME/$(quote "${1#\~/}")" ;;
    /*) quote "$1" ;;
    *) printf '%s' "\$HOME/phi3_jax/$(quote "$1")" ;;
  esac
}

remote_plain() { # the same for scp, whose relative paths start at home
  case $1 in
    \~/*) printf '%s' "${1#\~/}" ;;
    /*) printf '%s' "$1" ;;
    *) printf '%s' "phi3_jax/$1" ;;
  esac
}

count() { # count NUMBER WHAT: that so many arguments were given
  [ "${#arguments[@]}" -eq "$1" ] || die "$command takes $2; see scripts/tpu_vm.sh --help"
}

create() {
  count 0 "options only"
  [ -n "$type" ] || die "create needs --type, such as v5litepod-8"
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || die "--type is $type, expected a type and a size such as v5litepod-8"
  if [ -z "$runtime" ]; then
    case $type in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v4-*) runtime=tpu-ubuntu2204-base ;;
      *) die "no runtime version is known for $type; give --runtime-version" ;;
    esac
  fi
  local what="--node-id=$name" count=''
  if [ "$slices" -gt 1 ]; then
    # Those of one request are told how to find each other.
    $queued || die "several slices are rented together, in line; give --queued"
    what="--node-prefix=$name" count="--node-count=$slices"
  fi
  if $queued; then
    gcloud_tpu queued-resources create "$name" "$what" ${count:+"$count"} "--accelerator-type=$type" \
      "--runtime-version=$runtime" ${valid_for:+"--valid-until-duration=$valid_for"} ${spot:+--spot}
  else
    [ -z "$valid_for" ] || die "--valid-for is for --queued; leave it out"
    gcloud_tpu tpu-vm create "$name" "--accelerator-type=$type" "--version=$runtime" ${spot:+--spot}
  fi
}

install() {
  count 0 "options only"
  local get archive
  if [ -n "$git_url" ]; then
    get="rm -rf ~/phi3_jax && git clone --quiet $(quote "$git_url") ~/phi3_jax && cd ~/phi3_jax"
    [ -z "$ref" ] || get+=" && git checkout --quiet $(quote "$ref")"
  else
    # A commit, not the folder as it is: every worker gets the same, and it has a name.
    $dry_run || [ -z "$(git -C "$root" status --porcelain)" ] || echo "tpu_vm.sh: uncommitted changes are not copied" >&2
    archive=${TMPDIR:-/tmp}/phi3_jax-$name.tar.gz
    run git -C "$root" archive --format=tar.gz "--output=$archive" "${ref:-HEAD}"
    copy_to_workers "$archive" phi3_jax.tar.gz
    run rm "$archive"
    get="mkdir -p ~/phi3_jax && tar -xzf ~/phi3_jax.tar.gz -C ~/phi3_jax && cd ~/phi3_jax"
  fi
  # The images' own Python is older than JAX wants; uv brings one along.
  local environment="python3 -m pip install --quiet --user uv"
  environment+=" && ~/.local/bin/uv venv --quiet --clear --seed --python 3.12 .venv"
  environment+=" && .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]'"
  local check="import jax; print(jax.process_index(), jax.local_device_count(), jax.device_count())"
  on_workers "$get && $environment && .venv/bin/python -c $(quote "$check")"
}

upload() {
  count 2 "LOCAL and REMOTE"
  local from=${arguments[0]} to=${arguments[1]}
  [ -e "$from" ] || die "$from: no such file or folder"
  on_workers "mkdir -p $(remote "$(dirname "$to")")"
  copy_to_workers "$from" "$(remote_plain "$to")" --recurse
}

mount_bucket() {
  count 1 "BUCKET"
  local bucket=${arguments[0]#gs://}
  [[ $bucket =~ ^[a-z0-9][a-z0-9._-]+$ ]] || die "$bucket is no name of a bucket; give it without a path"
  local missing="echo 'gcsfuse is not installed on this VM; see the page on Cloud Storage FUSE' >&2; exit 1"
  # Folders are renamed when a checkpoint is whole; what one worker writes the others must see at once.
  local options="--implicit-dirs --rename-dir-limit 100000 --metadata-cache-ttl-secs 0"
  on_workers "command -v gcsfuse >/dev/null || { $missing; }; mkdir -p ~/bucket; \
mountpoint -q ~/bucket || gcsfuse $options $(quote "$bucket") ~/bucket"
}

train() {
  [ "${#arguments[@]}" -gt 0 ] || die "train needs the arguments of phi3-jax train, such as --config FILE"
  local busy="echo 'a run is going on; stop it first' >&2; exit 1"
  # A session of its own, which outlives this connection. JAX finds the other workers by itself.
  on_workers "cd ~/phi3_jax || exit 1; if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then $busy; fi; \
setsid nohup .venv/bin/phi3-jax train $(quote_all "${arguments[@]}") >train.log 2>&1 </dev/null & \
echo \$! >train.pid"
}

run_program() {
  [ "${#arguments[@]}" -gt 0 ] || die "run needs a program, such as phi3-jax benchmark train"
  on_workers "cd ~/phi3_jax && PATH=\$PWD/.venv/bin:\$PATH $(quote_all "${arguments[@]}")"
}

status() {
  count 0 "no arguments"
  if $queued; then gcloud_tpu queued-resources describe "$name" '--format=value(state.state)'; fi
  local each
  for each in $(nodes); do gcloud_tpu tpu-vm describe "$each" '--format=value(state, health)'; done
  on_workers "cd ~/phi3_jax && if [ ! -f train.pid ]; then echo \"\$(hostname): no run yet\"; \
elif kill -0 \$(cat train.pid) 2>/dev/null; then echo \"\$(hostname): running\"; else echo \"\$(hostname): ended\"; fi"
}

logs() {
  count 0 "options only"
  [[ $worker =~ ^[0-9]+$ ]] || die "--worker is $worker, expected a number"
  [[ $slice =~ ^[0-9]+$ && $slice -lt $slices ]] || die "--slice is $slice, expected a number below $slices"
  gcloud_tpu tpu-vm ssh "$(node "$slice")" "--worker=$worker" "--command=tail -n 100 ${follow:+-f }~/phi3_jax/train.log"
}

stop() {
  count 0 "no arguments"
  # The process leads a group of its own.
  on_workers "kill -TERM -- -\$(cat ~/phi3_jax/train.pid)"
}

fetch() {
  count 2 "REMOTE and LOCAL"
  run mkdir -p "${arguments[1]}"
  gcloud_tpu tpu-vm scp --recurse "$(node 0):$(remote_plain "${arguments[0]}")" "${arguments[1]}" --worker=0
}

delete() {
  count 0 "options only"
  [ "$slices" -eq 1 ] || $queued || die "several slices go with their place in the line; give --queued"
  if ! $yes && ! $dry_run; then
    read -r -p "Delete the TPU $name in $zone and everything on its disks? [y/N] " answer || answer=''
    if [ "$answer" != y ]; then echo "tpu_vm.sh: $name stays" >&2 && exit 1; fi
  fi
  if $queued; then
    gcloud_tpu queued-resources delete "$name" --force --quiet
  else
    gcloud_tpu tpu-vm delete "$name" --quiet
  fi
}

value() { # value OPTION [VALUE]: that a value is there
  [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value after it"
}

parse() {
  while [ $# -gt 0 ]; do
    case $command:$1 in
      *:--name | *:--zone | *:--project | *:--slices) ;;
      create:--type | create:--runtime-version | create:--valid-for | install:--git | install:--ref | logs:--worker | logs:--slice) ;;
      *:--dry-run) dry_run=true && shift && continue ;;
      create:--queued | status:--queued | delete:--queued) queued=true && shift && continue ;;
      create:--spot) spot=yes && shift && continue ;;
      delete:--yes) yes=true && shift && continue ;;
      logs:--follow) follow=yes && shift && continue ;;
      *:-h | *:--help) usage && exit 0 ;;
      train:* | *:[!-]*) # from here on the arguments are the command's own
        arguments=("$@")
        break
        ;;
      *) die "unknown option $1 of $command; see scripts/tpu_vm.sh --help" ;;
    esac
    value "$@"
    case $1 in
      --name) name=$2 ;;
      --zone) zone=$2 ;;
      --slices) slices=$2 ;;
      --slice) slice=$2 ;;
      --project) project=$2 ;;
      --type) type=$2 ;;
      --runtime-version) runtime=$2 ;;
      --valid-for) valid_for=$2 ;;
      --git) git_url=$2 ;;
      --ref) ref=$2 ;;
      --worker) worker=$2 ;;
    esac
    shift 2
  done
  while [ $# -gt 0 ]; do
    [ "$1" != --dry-run ] || die "--dry-run stands among the arguments of $command; put it before them"
    shift
  done
}

command=${1:-}
case $command in
  '' | -h | --help) usage && exit 0 ;;
  create | install | upload | mount | train | run | status | logs | stop | fetch | delete) shift ;;
  *) die "unknown command $command; see scripts/tpu_vm.sh --help" ;;
esac
parse "$@"
[ -n "$name" ] || die "no TPU is named; give --name, or set TPU_NAME"
[ -n "$zone" ] || die "no zone is given; give --zone, or set TPU_ZONE"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name is $name, expected small letters, digits and hyphens"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is $slices, expected a number of at least 1"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone is $zone, expected one such as us-west4-a"
$dry_run || type -P gcloud >/dev/null || die "gcloud is not installed; install the Google Cloud CLI, or add --dry-run"

case $command in
  mount) mount_bucket ;;
  run) run_program ;;
  *) "$command" ;;
esac
