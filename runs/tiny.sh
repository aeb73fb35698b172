#!/usr/bin/env bash
# The embedded model from nothing to a package, in order. Run from the repository's root; every line resumes when it is
# given again. RECEIPTS names the folder of the scanned receipts (default: as the recipes say); the pictures themselves
# are not part of this repository. Hours of CPU time: drawing 0.1, reading 4, labels and heads 1.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
RECIPE="${RECIPE:-recipes/tiny/reader.yaml}"

# 1. Pages are drawn (and real receipts decoded) once. Typefaces: see PACKAGES in tiny/typefaces.py.
python tiny/train.py pack --recipe "$RECIPE"

# 2. The plain model: lines, strips and crops first, then pages, scenes and albums beside them.
python tiny/train.py train --recipe "$RECIPE" --output runs/tiny-reader
python tiny/train.py measure --recipe "$RECIPE" --output runs/tiny-reader

# 3. Where its own answers look becomes the region branch.
qzoom label regions --model runs/tiny-reader/model --questions documents:0:330 --questions scenes:0:300 \
  --tokens 400 --max-new-tokens 32 -o runs/tiny-labels/regions
qzoom train regions --recipe recipes/tiny/regions.yaml --base runs/tiny-reader/model --labels runs/tiny-labels/regions \
  -o runs/tiny-regions

# 4. Whether zooming helped becomes the gate.
qzoom label gate --by zoom --model runs/tiny-regions/model --questions documents:400:400 --questions scenes:300:200 \
  --tokens 64,100,144 -o runs/tiny-labels/gate
qzoom train gate --recipe recipes/tiny/gate.yaml --base runs/tiny-regions/model --labels runs/tiny-labels/gate \
  -o runs/tiny-gate

# 5. What it can do.
qzoom eval documents --seed 500000 --count 60 --model runs/tiny-gate/model
qzoom eval scenes --seed 500000 --count 60 --model runs/tiny-gate/model
