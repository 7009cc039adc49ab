#!/usr/bin/env bash
# A real SLURM on one host, without systemd: slurmctld and two slurmd ("nodes") of 8 CPUs each, whatever the host has.
#
#   tests/slurm/cluster.sh install            Debian's packages, where they are missing (root)
#   tests/slurm/cluster.sh start DIR PORT     all state in DIR; ports PORT to PORT+2 on loopback; SLURM_CONF=DIR/slurm.conf
#   tests/slurm/cluster.sh stop DIR           cancels the jobs, and ends what start has started
#
# Partitions: main (default), low (requeued when preempted), high (preempts low). Nodes resolve by lines in /etc/hosts, which stop removes.
set -euo pipefail
NODES=2 CPUS=8 KILL_WAIT=5 GRACE=60
log() { echo "cluster: $*" >&2; }
die() { log "$*"; exit 1; }

alive() { # alive NAME WORD: the process of pid/NAME.pid lives, and its command line has WORD
  local pid; pid=$(tr -dc 0-9 2>/dev/null <"$D/pid/$1.pid") && [ -n "$pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- "$2"
}
end() { # end NAME WORD: SIGTERM, and SIGKILL after 10 s
  alive "$1" "$2" || return 0
  local pid; pid=$(tr -dc 0-9 <"$D/pid/$1.pid"); kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 100); do alive "$1" "$2" || return 0; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
}
within() { # within SECONDS COMMAND...: poll until it succeeds
  local tries=$(($1 * 5)); shift
  for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.2; done; return 1
}

install() {
  local missing=() pair
  for pair in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge; do
    PATH=$PATH:/usr/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ ${#missing[@]} = 0 ] && return 0
  [ "$(id -u)" = 0 ] || die "SLURM is not installed, and only root can install it"
  command -v apt-get >/dev/null || die "SLURM is not installed, and there is no apt-get to install it"
  apt-get update -qq >/dev/null 2>&1 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 || die "apt-get cannot install ${missing[*]}"
}

configure() {
  local i memory; memory=$(awk '/MemTotal/{print int($2/1024*0.9)}' /proc/meminfo)
  {
    cat <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/ctld
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/pid/slurmctld.pid
SlurmdPidFile=$D/pid/%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
TreeWidth=65533
SlurmdTimeout=300
KillWait=$KILL_WAIT
MinJobAge=3600
MessageTimeout=60
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=$NAME$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=$CPUS CoresPerSocket=$CPUS RealMemory=$memory"
    done
    cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  } >"$D/slurm.conf"
  echo "CgroupPlugin=autodetect" >"$D/cgroup.conf"
}

nodes_up() { [ "$(sinfo -h -N -p main -o '%t' 2>/dev/null | grep -cE '^(idle|mix|alloc)$')" = "$NODES" ]; }
no_jobs() { [ -z "$(squeue -h)" ]; }
end_jobs() { # processes of jobs that outlived them: they have the cluster's SLURM_CONF in their environment, and a job's number
  local folder
  for folder in /proc/[0-9]*; do
    if tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" &&
      { tr '\0' '\n' 2>/dev/null <"$folder/environ" | grep -q '^SLURM_JOB_ID=' || [ "$(cat "$folder/comm" 2>/dev/null)" = slurmstepd ]; }; then
      kill -KILL "${folder#/proc/}" 2>/dev/null || true
    fi
  done
}
forget_hosts() { # in place, as /etc/hosts may be a mount
  grep -q "# $NAME" /etc/hosts || return 0
  local kept; kept=$(grep -v "# $NAME" /etc/hosts); printf '%s\n' "$kept" >/etc/hosts
}

start() {
  [ "$(id -u)" = 0 ] || die "needs root"
  umask 022
  mkdir -p "$D"/{pid,log,munge,ctld,spool}
  echo "$PORT" >"$D/port"
  configure
  local i
  for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 $NAME$i # $NAME" >>/etc/hosts; done
  head -c 128 /dev/urandom >"$D/munge/munge.key"; chmod 600 "$D/munge/munge.key"
  munged --force --num-threads=2 --key-file="$D/munge/munge.key" --socket="$D/munge/socket" --pid-file="$D/pid/munged.pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" || die "munged does not start: see $D/log/munged.log"
  within 60 munge -S "$D/munge/socket" -n || die "munge does not answer"
  slurmctld || die "slurmctld does not start: see $D/log/slurmctld.log"
  within 60 scontrol ping || die "slurmctld does not answer: see $D/log/slurmctld.log"
  for ((i = 1; i <= NODES; i++)); do
    mkdir -p "$D/spool/$NAME$i"
    slurmd -N "$NAME$i" || die "slurmd $i does not start: see $D/log/$NAME$i.log"
  done
  within 60 nodes_up || die "the nodes do not come up: see $D/log"
}

stop() {
  local i
  if alive slurmctld slurmctld; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    within $((KILL_WAIT + 60)) no_jobs || log "jobs that did not end: $(squeue -h)"
  fi
  for ((i = 1; i <= NODES; i++)); do end "$NAME$i" "slurmd.*-N $NAME$i"; done
  end_jobs
  end slurmctld slurmctld
  end munged munged
  forget_hosts
}

export PATH=$PATH:/usr/sbin
if [ "${1:-}" = install ]; then install; exit; fi
[ $# -ge 2 ] || die "usage: $0 install | start DIR PORT | stop DIR"
D=$2 PORT=${3:-$(cat "$2/port")} NAME=tptest${3:-$(cat "$2/port")}n
export SLURM_CONF=$D/slurm.conf
"$1"
