#!/bin/sh
# Everything that README.md here shows, from the project's root: two to three hours on two cores.
set -e
export OMP_NUM_THREADS=1 WANDB_MODE=disabled # a process a core; nothing mirrored
train="python scripts/train.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2"

$train sweep=norms
# Cells that several sweeps ask for need only one run: a sweep skips what it finds finished.
mkdir -p runs/warmup runs/depth runs/others
for run in runs/norms/*-bs2-*; do
    cp -r "$run" runs/others/
    rate=$(sed -n 's/^  lr: //p' "$run/config.yaml")
    case $rate in 0.001 | 0.003) cp -r "$run" runs/depth/ ;; esac
    case $run in */layer-*) [ "$rate" = 0.01 ] || cp -r "$run" runs/warmup/ ;; esac
done
$train sweep=warmup
$train sweep=depth
others="$train sweep=norms train.batch_size=2 hydra.sweep.dir=runs/others"
$others norm=dyt,power optim.lr=1e-3,3e-3,1e-2
$others norm=dyt norm.alpha=8,32 optim.lr=1e-3,3e-3
$others norm=batch_ema optim.lr=1e-3,3e-3
$train norm=batch placement=pre,post hydra.sweep.dir=runs/longer
$train norm=layer placement=pre,post optim.lr=3e-3,1e-3 hydra.sweep.dir=runs/longer

for question in norms depth others longer; do
    python scripts/report.py runs/$question
done
python scripts/report.py runs/warmup baseline=optim.warmup_steps=40
python scripts/study/one_sample.py runs/norms

python scripts/study/pack.py
