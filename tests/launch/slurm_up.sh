#!/usr/bin/env bash
# A Slurm cluster of four nodes on this one machine, all in a directory: tests/launch/slurm_up.sh DIR. It runs as root,
# needs Debian's packages slurm-wlm and munge, and names n0 to n3 in /etc/hosts. `kill $(cat DIR/*.pid)` takes it down.
set -euo pipefail
directory=$(realpath -m "$1")
nodes=(n0 n1 n2 n3)
mkdir -p "$directory"/{state,spool,log} /run/munge

if [ ! -f /etc/munge/munge.key ]; then
  (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key)
fi
chown munge: /etc/munge/munge.key /run/munge
pgrep -x munged > /dev/null || su -s /bin/sh munge -c /usr/sbin/munged

# Processes of a job dial its first node by name.
grep -qE "[[:space:]]${nodes[0]}([[:space:]]|$)" /etc/hosts || echo "127.0.0.1 ${nodes[*]}" >> /etc/hosts

cat > "$directory/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=30
MinJobAge=300
NodeName=n[0-3] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[17001-17004] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=n[0-3] Default=YES MaxTime=INFINITE State=UP
CONF

export SLURM_CONF=$directory/slurm.conf
if sinfo -h > /dev/null 2>&1; then
  echo "port 16817 has a cluster already" >&2
  exit 1
fi
slurmctld -c
sleep 1
for node in "${nodes[@]}"; do
  mkdir -p "$directory/spool/$node"
  slurmd -N "$node"
done
for _ in $(seq 30); do
  [ "$(sinfo -h -t idle -o %D)" = 4 ] && exit
  sleep 1
done
echo "the nodes are not idle: see $directory/log" >&2
exit 1
