#!/usr/bin/env bash
# Several ranks by torch's or DeepSpeed's launcher, on this machine or on the hosts of a hostfile:
#     multinode.sh torchrun|deepspeed RANKS|HOSTFILE CONFIG [what `moemm train` takes]
# HOSTFILE: a line `HOST slots=RANKS` for each; the first host is where ranks meet. All hosts have the same folders.
#   deepspeed: run it once. Needs pdsh here, and ssh to every host without a password.
#   torchrun: run the same line on every host. NODE_RANK=N (from 0) where a host does not know its name in HOSTFILE.
# PYTHON, MASTER_ADDR and MASTER_PORT are taken from the environment.
set -euo pipefail

launcher=${1:?multinode.sh torchrun|deepspeed RANKS|HOSTFILE CONFIG ...}
where=${2:?multinode.sh torchrun|deepspeed RANKS|HOSTFILE CONFIG ...}
shift 2
python=${PYTHON:-python}
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
unset RANK WORLD_SIZE LOCAL_RANK # of a job that this one is started from
free_port='import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'

hosts=() slots=()
if [[ -f $where ]]; then
    while read -r host count; do
        hosts+=("$host") slots+=("${count#slots=}")
    done < <(sed -E 's/#.*//; /^[[:space:]]*$/d' "$where")
    port=${MASTER_PORT:-29500} # one that all hosts know
else
    slots=("$where")
    port=${MASTER_PORT:-$("$python" -c "$free_port")}
fi
address=${MASTER_ADDR:-${hosts[0]:-127.0.0.1}}

# Index of this machine in the hostfile.
node_rank() {
    local names index
    names=" $(hostname) $(hostname -s) $(hostname -f 2>/dev/null || true) $(hostname -I) localhost 127.0.0.1 "
    for index in "${!hosts[@]}"; do
        [[ $names == *" ${hosts[index]} "* ]] && echo "$index" && return
    done
    echo "error: none of the hosts of $where is this machine:$names. Set NODE_RANK, 0 for the first." >&2
    return 6
}

case $launcher in
torchrun)
    node=${NODE_RANK:-0}
    ((${#hosts[@]} > 1)) && [[ -z ${NODE_RANK:-} ]] && node=$(node_rank)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(("$(nproc)" > slots[node] ? "$(nproc)" / slots[node] : 1))}"
    exec "$python" -m torch.distributed.run --nnodes "${#slots[@]}" --node-rank "$node" \
        --nproc-per-node "${slots[node]}" --master-addr "$address" --master-port "$port" -m moemm train "$@"
    ;;
deepspeed)
    if ((${#hosts[@]} == 0)); then
        exec "$python" -m deepspeed.launcher.runner --num_accelerators "${slots[0]}" --master_port "$port" \
            --module moemm train "$@"
    fi
    if [[ -z ${DS_ENV_FILE:-} && ! -e .deepspeed_env && ! -e ~/.deepspeed_env ]]; then
        # What ranks on other hosts get of this environment: DeepSpeed sends little more than PYTHON* and NCCL_*.
        file=$(mktemp)
        env | grep -E '^(CUDA_|DS_|GLOO_|MOEMM_|NCCL_|OMP_|TORCH_)[A-Z0-9_]*=' >"$file" || true
        exec 9<"$file"
        rm "$file"
        export DS_ENV_FILE=/proc/$$/fd/9 # there until the launcher ends, which keeps this process's id
    fi
    exec "$python" -m deepspeed.launcher.runner --hostfile "$where" --launcher pdsh \
        --master_addr "$address" --master_port "$port" --module moemm train "$@"
    ;;
*)
    echo "error: multinode.sh: the launcher is $launcher; allowed are torchrun, deepspeed" >&2
    exit 6
    ;;
esac
