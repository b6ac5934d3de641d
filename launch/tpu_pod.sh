#!/usr/bin/env bash
# Rents a TPU slice, runs on all its workers, collects, and gives it back.
#
#   export WORKDIR=gs://my-bucket/runs/first
#   launch/tpu_pod.sh --dry-run --config configs/synthetic.py    # prints only
#   launch/tpu_pod.sh --config configs/synthetic.py
#
# The slice is deleted however the run ends, and the exit status is the run's.
# The same command again resumes, on a slice of any size. Needs gcloud with a
# project, and `ssh-add ~/.ssh/google_compute_engine` for more than one worker.
set -euo pipefail
cd "$(dirname "$0")/.."

# The run's folder in a bucket: the workers share no disk.
WORKDIR=${WORKDIR:?a folder in a bucket, as gs://my-bucket/runs/first}
# Where metrics, pictures and reports are copied to; checkpoints stay.
RESULTS=${RESULTS:-runs/$(basename "$WORKDIR")}
# What to rent, and where. `gcloud compute tpus tpu-vm accelerator-types list
# --zone=ZONE` and `... versions list --zone=ZONE` say what there is.
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5-lite}
TPU_ZONE=${TPU_ZONE:-us-west4-a}
# --spot is cheaper and may be taken away; --reserved uses a reservation.
TPU_TERMS=${TPU_TERMS---spot}
# New for each start, so that only what was rented here can be deleted.
TPU_NAME=${TPU_NAME:-unet-jax}-$(date +%Y%m%d-%H%M%S)
# The VM's own Python may be too old. Versions are those of the lock file.
INSTALL='git clone -q unet_jax.bundle unet_jax && cd unet_jax &&
python3 -m pip install -q --user uv &&
python3 -m uv venv -q --python 3.11 .venv &&
python3 -m uv pip install -q -c requirements.lock -e ".[tpu,gcs]"'

dry=false child=
if [[ ${1-} == --dry-run ]]; then
  dry=true
  shift
fi
printf -v arguments ' %q' "$@" --workdir "$WORKDIR"
bundle=$(mktemp -d)/unet_jax.bundle

run() { # Prints a command as it could be typed, and runs it.
  printf '%q ' "$@" && echo
  $dry && return
  # In the background: a shell answers signals only between commands.
  "$@" <&0 &
  child=$!
  wait "$child"
}
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$TPU_ZONE"; }
finish() {
  status=$?
  trap - EXIT
  trap '' INT TERM # A second Ctrl-C must not leave a slice that costs.
  kill "$child" 2>/dev/null || true # What a signal left running.
  run gcloud storage rsync --recursive --exclude='checkpoints/.*' \
    "$WORKDIR" "$RESULTS" || echo "nothing collected from $WORKDIR" >&2
  tpu delete "$TPU_NAME" --quiet || echo "delete $TPU_NAME by hand!" >&2
  rm -r "$(dirname "$bundle")"
  exit "$status"
}

# What is committed goes, so that the run can name its revision.
run git bundle create -q "$bundle" HEAD
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck disable=SC2086 # TPU_TERMS is several words, or none.
tpu create "$TPU_NAME" --accelerator-type="$TPU_TYPE" \
  --version="$TPU_VERSION" $TPU_TERMS \
  --scopes=https://www.googleapis.com/auth/cloud-platform
tpu scp "$bundle" "$TPU_NAME:" --worker=all
tpu ssh "$TPU_NAME" --worker=all --command="$INSTALL"
tpu ssh "$TPU_NAME" --worker=all \
  --command="cd unet_jax && .venv/bin/python -m unet_jax.main$arguments"
