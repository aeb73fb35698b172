#!/usr/bin/env bash
# All steps that make the embedded model, in order. Run it from the repository's root; every command resumes an interrupted
# run. QZOOM_RECEIPTS names the folder of the scanned receipts; the images are not part of this repository. Hours of CPU
# time: drawing 0.1, reading 8.6, labels and heads 0.8.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export QZOOM_RECEIPTS="${QZOOM_RECEIPTS:-../shared/data/receipts}"
RECIPE="${RECIPE:-recipes/tiny/reader.yaml}"

# 0. The weights of the first version, which this one goes on from: an earlier trainer made them.
if [ ! -e runs/first-tiny/model.safetensors ]; then
  mkdir -p runs/first-tiny
  git archive e6b95c6 src/qzoom/assets/tiny | tar -x --strip-components 4 -C runs/first-tiny
fi

# 1. Draw the pages (and decode real receipts) once. Fonts: see PACKAGES in tiny/typefaces.py.
python tiny/train.py pack --recipe "$RECIPE"

# 2. Train the base model: lines, strips and crops first, then also pages, scenes and albums.
python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" \
  tiny/train.py train --recipe "$RECIPE" --output runs/tiny-reader
python tiny/train.py measure --recipe "$RECIPE" --output runs/tiny-reader

# 3. Train the region branch on the known places of the answers. (`label regions` without `--from boxes` takes the attention of
#    the model's own answers, as the method has it; this model misreads too often for that, see its card.) The packaged branch had its first 500 steps on
#    the base of minute 335, its second 500 on the last one.
qzoom label regions --from boxes --model runs/tiny-reader/model --questions documents:0:500 --questions scenes:0:400 \
  --questions "receipts:$QZOOM_RECEIPTS:train" --questions "receipts:$QZOOM_RECEIPTS:train-more" \
  --tokens 400 -o runs/tiny-labels/regions
qzoom train regions --recipe recipes/tiny/regions.yaml --base runs/tiny-reader/model -o runs/tiny-regions-first
qzoom train regions --refit --recipe recipes/tiny/regions.yaml --base runs/tiny-regions-first/model -o runs/tiny-regions

# 4. Train the gate on whether zooming helped.
qzoom label gate --by zoom --model runs/tiny-regions/model --questions documents:600:250 --questions scenes:500:200 \
  --tokens 64,100,144 -o runs/tiny-labels/gate
qzoom train gate --recipe recipes/tiny/gate.yaml --base runs/tiny-regions/model -o runs/tiny-gate

# 5. Evaluate.
qzoom eval documents --seed 500000 --count 60 --model runs/tiny-gate/model
qzoom eval scenes --seed 500000 --count 60 --model runs/tiny-gate/model
