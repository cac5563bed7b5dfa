#!/bin/sh
# Everything that README.md here shows, from the project's root: about two hours on two cores.
set -e
export OMP_NUM_THREADS=1 WANDB_MODE=disabled # a process a core; nothing mirrored
train="python scripts/train.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2"
all=layer,rms,dummy,batch,dyt,power

$train sweep=norms
# Cells that several sweeps ask for need only one run: a sweep skips what it finds finished.
mkdir -p runs/warmup runs/depth runs/others
for run in runs/norms/*-bs2-*; do
    cp -r "$run" runs/others/
    case $run in */layer-*) cp -r "$run" runs/warmup/ ;; esac
    if grep -qE '^  lr: (0.001|0.003)$' "$run/config.yaml"; then cp -r "$run" runs/depth/; fi
done
$train sweep=norms norm=$all train.batch_size=2 hydra.sweep.dir=runs/others
$train sweep=warmup
$train sweep=depth
for question in norms others warmup depth; do
    python scripts/report.py runs/$question
done
python .github/study/one_sample.py runs/norms
