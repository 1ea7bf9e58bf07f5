#!/bin/bash
#SBATCH --job-name=first
#SBATCH --array=0-2%2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH '--output=/shared/first sweep/engine/%A_%a.out'
#SBATCH --mem=0
case $SLURM_ARRAY_TASK_ID in # Slurm starts the tasks of an array in order
0) cell=(/opt/python/bin/python -m launch cell '/shared/first sweep' 3) ;;
1) cell=(env 'XLA_FLAGS=--a=1 --b=2' /opt/python/bin/python -m launch cell '/shared/first sweep' 7) ;;
2) cell=(/opt/python/bin/python -m launch cell '/shared/first sweep' 0) ;;
esac
each='trap : TERM; "$@"; code=$?; case $code in 1 | 2 | 3 | 4 | 5) exit 20$code ;; esac; exit $code'
srun --kill-on-bad-exit=0 --wait=60 bash -c "$each" - "${cell[@]}"
code=$?
case $code in
201 | 202 | 203 | 204 | 205) code=$((code - 200)) ;;
6 | 75 | 137 | 143)
  [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" ;;
esac
exit $code
