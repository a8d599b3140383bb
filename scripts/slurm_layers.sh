#!/bin/bash
# The layers, side by side. By hand: sbatch --dependency=afterok:ID-OF-DIGITS scripts/slurm_layers.sh
#SBATCH --job-name=assay-layers
#SBATCH --array=0-2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=TERM@120
#SBATCH --cpus-per-task=4
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
layers=(0 2 3)
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID may name all
trap : TERM # for the run, which saves itself; this script outlives it
srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --unbuffered kedro run --namespaces="layer_${layers[SLURM_ARRAY_TASK_ID]}" # no signal without srun
code=$?
# 143: asked to stop, it has saved itself. A job that is RUNNING was not cancelled, nor queued again
# by Slurm; `incomplete` has Slurm look once more, since that may come to be in between.
if [ $code = 143 ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue incomplete "$job" && exec sleep 600
fi
exit $code
