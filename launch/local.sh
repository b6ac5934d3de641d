#!/usr/bin/env bash
# N processes of one run on this machine: a rehearsal of many hosts.
#
#   launch/local.sh 2 --config configs/synthetic.py --workdir runs/two
#
# For CPU: on GPU and TPU a single process drives all devices of a machine.
# SIGINT and SIGTERM reach every process once. Ends with the first status that
# is not 0; what still runs GRACE seconds (30) after that is ended too, since a
# process whose peer is gone may wait for it forever.
set -euo pipefail

if [[ ! ${1-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N [arguments of python -m unet_jax.main]" >&2
  exit 2
fi
n=$1
shift

# A port that nobody answers on, below those the system gives to clients.
while port=$((20000 + RANDOM % 12000)) &&
  (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null; do :; done
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_NUM_PROCESSES=$n
# Each process's share of the cores: XLA makes so many threads.
cores=$(getconf _NPROCESSORS_ONLN)
export NPROC=$((cores > n ? cores / n : 1))

pids=()
tell() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'tell INT' INT
trap 'tell TERM' TERM

# Job control gives each process a group of its own. In ours, Ctrl-C would
# reach it twice, from the terminal and from here, and the second one kills.
set -m
for ((i = 0; i < n; i++)); do
  JAX_PROCESS_ID=$i "${PYTHON:-python}" -m unet_jax.main "$@" </dev/null &
  pids+=($!)
done
set +m

status=0
next=TERM
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    ended=0
    wait "${pids[i]}" || ended=$?
    unset "pids[i]"
    if ((ended && !status)); then
      status=$ended
      deadline=$((SECONDS + ${GRACE:-30}))
    fi
  done
  if ((status && SECONDS >= deadline)); then
    tell "$next"
    next=KILL
    deadline=$((SECONDS + 10))
  fi
  sleep 0.2 || true # A signal may end it.
done
exit "$status"
