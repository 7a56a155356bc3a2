#!/usr/bin/env bash
# Several ranks on this machine, without a launcher:
#     local.sh RANKS CONFIG [what `moemm train` takes]
# SIGINT, SIGTERM and SIGUSR1 reach every rank once. The exit code is that of the first rank that ends with another one
# than 0; the other ranks then have GRACE_S seconds to end. PYTHON and MASTER_PORT are taken from the environment.
set -um # -m: ranks in process groups of their own, so that Ctrl-C does not reach them twice

ranks=${1:?local.sh RANKS CONFIG ...}
shift
python=${PYTHON:-python}
grace_s=${GRACE_S:-30}
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1
export MASTER_PORT="${MASTER_PORT:-$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

pids=()
tell() { for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done; }
trap 'tell INT' INT
trap 'tell TERM' TERM HUP
trap 'tell USR1' USR1
for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$python" -u -m moemm train "$@" </dev/null &
    pids+=($!)
done

code=0
until=0
while ((${#pids[@]})); do
    for index in "${!pids[@]}"; do
        kill -0 "${pids[index]}" 2>/dev/null && continue
        wait "${pids[index]}" # it has ended: this gives its exit code at once
        ended=$?
        unset "pids[index]"
        ((ended && !code)) && code=$ended until=$((SECONDS + grace_s))
    done
    if ((code && ${#pids[@]} && SECONDS > until)); then
        echo "local.sh: ${#pids[@]} rank(s) still there $grace_s s after another ended with code $code: killed" >&2
        tell KILL
    fi
    sleep 0.2 &
    wait $! # a signal ends this at once, unlike a sleep in the foreground
done
exit "$code"
