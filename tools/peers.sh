#!/usr/bin/env bash
# Other people's tools on the embedded model, each listed or run: builds their environment, then runs the pipeline with
# all of the block `peers` and what report.methods names switched on, in a throw-away workspace. Needs a package index.
# Set PEERS to run a part, PEERS_VENV to put the environment elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(realpath -m "${PEERS_VENV:-.venv-peers}")
if ! cmp -s constraints-peers.txt "$environment/.ready"; then
  test -x "$environment/bin/python" || "${PYTHON:-python3.11}" -m venv "$environment"
  install() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-peers.txt "$@"; }
  install torch -e .
  # One that cannot be installed here must not keep the others from being run: its peers are listed with the reason.
  install -e '.[peers]' || for tool in hqq optimum-quanto auto-round gptqmodel cmake ninja; do
    install "$tool" || echo "$tool cannot be installed here; its peers will be listed as not run" >&2
  done
  tools/llama_cpp.sh "$environment" || echo "llama.cpp cannot be built here; its peers will be listed as not run" >&2
  cp constraints-peers.txt "$environment/.ready"
fi
export NASHSWARM_PEERS_PYTHON=$environment/bin/python
names() { PYTHONPATH=src python -c "from pathlib import Path; from nashswarm.config import load_params
params = load_params(Path('params.yaml')); print(','.join($1))"; }
dvc exp run --temp --name peers \
  -S "active.peers=[${PEERS:-$(names params.peers)}]" \
  -S "active.methods=[$(names 'dict.fromkeys((*params.active.methods, *params.report.methods))')]" "$@"
dvc exp branch peers peers-results
echo "Results are on the branch peers-results: git checkout peers-results -- metrics takes the measurements"
