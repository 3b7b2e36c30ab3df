#!/usr/bin/env bash
# The paper's models on WikiText-2, both protocols, all sample counts. Needs a network that reaches the hub; disk and
# memory were never measured: allow 30 GB, and 16 GB for GPT-2 XL. Set MODELS or METHODS to run a part.
set -euo pipefail
cd "$(dirname "$0")/.."
models=${MODELS:-gpt2,gpt2-medium,gpt2-large,gpt2-xl,opt-1_3b}
methods=${METHODS:-fp32,paper-uniform4,paper-nash,paper-swarm,uniform4,nash,rtn4-g64,rtn3-g64}
dvc exp run --temp --name paper \
  -S "active.models=[$models]" -S "active.methods=[$methods]" \
  -S active.calibration=wikitext2 -S 'active.corpora=[wikitext2]' "$@"
dvc exp branch paper paper-results
echo "Results are on the branch paper-results: git switch paper-results && dvc checkout; report/report.html"
