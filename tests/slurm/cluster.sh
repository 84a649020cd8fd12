#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, beside whatever else runs here: its own key, ports, state and logs, all in DIR.
#
#   tests/slurm/cluster.sh start DIR [CPUS]    prints the line that points sbatch, squeue, ... at it
#   tests/slurm/cluster.sh stop DIR
#
# Needs munged, slurmctld and slurmd: apt-get install -y slurm-wlm munge. Root is not needed, but Debian's munged and slurmd expect it.
set -euo pipefail

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
    local node
    node=$(hostname -s)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=neuromf
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 120 s by default, 5 s at least.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# Neither control groups nor binding to cores: they may belong to somebody else here.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# The node may claim more cores than it has, so that several jobs run at once on two.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=5
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
    for program in munged slurmctld slurmd; do
        command -v $program >/dev/null || fail "no $program: apt-get install -y slurm-wlm munge"
    done
    [ -e "$dir/slurm.conf" ] && fail "$dir holds a cluster already: stop it first"
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    (umask 077 && dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none)
    munged --force --num-threads=1 --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" || fail "munged did not start: see $dir/munged.log"
    configure
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -f "$SLURM_CONF" || fail "slurmctld did not start: see $dir/slurmctld.log"
    slurmd -f "$SLURM_CONF" || fail "slurmd did not start: see $dir/slurmd.log"
    for _ in $(seq 150); do
        if [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    fail "the node did not become idle: see $dir/slurmctld.log and $dir/slurmd.log"
}

stop() {
    export SLURM_CONF=$dir/slurm.conf
    timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 75); do
        [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
        sleep 0.2
    done
    for daemon in slurmd slurmctld munged; do
        end "$dir/$daemon.pid"
    done
    rm -f "$dir/slurm.conf"
}

end() {
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

verb=${1:-} dir=${2:-} cpus=${3:-4}
[ -n "$dir" ] || fail "usage: cluster.sh start DIR [CPUS] | stop DIR"
case $verb in
    start)
        mkdir -p "$dir"
        dir=$(realpath "$dir")
        start || { stop; exit 1; }
        ;;
    stop) dir=$(realpath "$dir") && stop ;;
    *) fail "usage: cluster.sh start DIR [CPUS] | stop DIR" ;;
esac
