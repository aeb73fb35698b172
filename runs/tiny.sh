#!/usr/bin/env bash
# All steps that make the embedded model, in order. Run it from the repository's root; every command resumes an interrupted
# run. QZOOM_RECEIPTS names the folder of the scanned receipts; the images are not part of this repository. Hours of CPU
# time: drawing 0.1, reading 15, proposed boxes 0.2, labels and heads 2.5.
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

# 3. Train the region branch on the known places of the answers (`label regions` without `--from boxes` takes the attention of
#    the model's own answers, as the method has it; this model misreads too often for that, see its card), train the base
#    model on crops where this branch looks, and fit the branch to the new base. The packaged branch was also fitted to the
#    base of minute 335, from which it comes, and of minute 513, whose boxes the base was trained on.
label_regions() {
  qzoom label regions --from boxes --model "$1" --questions documents:0:500 --questions scenes:0:400 \
    --questions "receipts:$QZOOM_RECEIPTS:train" --questions "receipts:$QZOOM_RECEIPTS:train-more" --tokens 400 -o "$2"
}
[ -d runs/tiny-reader-first ] || { cp -r runs/tiny-reader/model runs/tiny-reader-first.part && mv runs/tiny-reader-first.part runs/tiny-reader-first; }
label_regions runs/tiny-reader-first runs/tiny-labels/regions-first
qzoom train regions --recipe recipes/tiny/regions.yaml --base runs/tiny-reader-first --labels runs/tiny-labels/regions-first \
  -o runs/tiny-regions-first
python tiny/train.py propose --recipe "$RECIPE" --model runs/tiny-regions-first/model --output runs/tiny-proposals
python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" \
  tiny/train.py train --recipe "${RECIPE%.yaml}-proposals.yaml" --output runs/tiny-reader
refit_regions() { # the branch of one base fitted to the next: OLD_BASE OLD_BRANCH NEW_BASE LABELS OUTPUT
  label_regions "$3" "$4"
  if [ ! -d "$5-start" ]; then
    cp -r "$2" "$5-start.part"
    sed -i "s#$1#$3#" "$5-start.part/qzoom_config.json"
    mv "$5-start.part" "$5-start"
  fi
  qzoom train regions --refit --recipe recipes/tiny/regions.yaml --base "$5-start" --labels "$4" -o "$5"
}
refit_regions runs/tiny-reader-first runs/tiny-regions-first/model runs/tiny-reader/model runs/tiny-labels/regions-second \
  runs/tiny-regions-second

# 3b. The same once more, with real receipts whose values change places.
python tiny/train.py propose --recipe "$RECIPE" --model runs/tiny-regions-second/model --output runs/tiny-proposals-2
python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" \
  tiny/train.py train --recipe "${RECIPE%.yaml}-exchanged.yaml" --output runs/tiny-reader-exchanged
refit_regions runs/tiny-reader/model runs/tiny-regions-second/model runs/tiny-reader-exchanged/model \
  runs/tiny-labels/regions-third runs/tiny-regions-third

# 3c. The mean of both bases, which keeps what the second one lost, trained on at low rates; the branch goes on from the mean
#     of both branches, which refers to the first base.
python tiny/train.py average runs/tiny-reader/model runs/tiny-reader-exchanged/model --output runs/tiny-mean
python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" \
  tiny/train.py train --recipe "${RECIPE%.yaml}-mean.yaml" --output runs/tiny-reader-mean
[ -d runs/tiny-regions-mean ] ||
  python tiny/train.py average runs/tiny-regions-second/model runs/tiny-regions-third/model --output runs/tiny-regions-mean
refit_regions runs/tiny-reader/model runs/tiny-regions-mean runs/tiny-reader-mean/model runs/tiny-labels/regions runs/tiny-regions

# 4. Train the gate on whether zooming helped, on receipts too: those that the base model was not trained on.
python tiny/train.py held-out -o runs/tiny-held-out
qzoom label gate --by zoom --model runs/tiny-regions/model --questions documents:600:250 --questions scenes:500:200 \
  --questions receipts:runs/tiny-held-out:questions --tokens 64,100,144 -o runs/tiny-labels/gate
qzoom train gate --recipe recipes/tiny/gate.yaml --base runs/tiny-regions/model -o runs/tiny-gate

# 5. Evaluate.
qzoom eval documents --seed 500000 --count 60 --model runs/tiny-gate/model
qzoom eval scenes --seed 500000 --count 60 --model runs/tiny-gate/model
