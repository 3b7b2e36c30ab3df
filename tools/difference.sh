#!/usr/bin/env bash
# What the commit at hand does to the figures of another (main, unless one is named): difference/comment.md, Markdown for
# a pull request, and difference/index.html, DVC's plots of both. Reads committed metrics alone and runs the report of
# either commit in a throw-away clone: seconds, no cached data, and the checkout stays as it is.
set -euo pipefail
base=$(git rev-parse --verify --quiet "${1:-main}^{commit}") || {
  echo "error: no commit '${1:-main}' here; name another, or fetch it (CI: fetch-depth 0)" >&2
  exit 2
}
change=$(git rev-parse HEAD)
target=$(realpath -m "${2:-difference}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone --quiet --shared --no-checkout "$(git rev-parse --show-toplevel)" "$scratch/clone"
cd "$scratch/clone"

# DVC compares commits by their dvc.lock; where this machine draws a figure otherwise, that of either is made to fit it.
report() {
  git checkout --quiet --detach "$2"
  dvc repro --quiet --single-item $(grep -oE '^  (imports|report):$' dvc.yaml | tr -d ' :')  # old commits lack imports
  git -c user.name=difference -c user.email=difference@localhost commit --quiet --allow-empty --all -m report
  git tag "$1"
}
report base "$base"
report change "$change"

mkdir -p "$target"
dvc plots diff base change --out "$target" >"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
dvc metrics diff --md base change >"$scratch/table"
{
  echo "**Figures of ${change:0:10} against ${base:0:10}**"
  echo
  if grep -q '^| *metrics/' "$scratch/table"; then
    awk 'NR <= 2 || / size\.bits_per_weight | quality\.[^ ]+\.(delta_loss_percent|kl_mean) /' "$scratch/table"
    printf '\n<details><summary>All figures that differ</summary>\n\n'
    head -n 300 "$scratch/table"  # about 30,000 characters; a comment on GitHub may have 65,536
    printf '\n</details>\n'
  else
    echo "No figure differs."
  fi
} >"$target/comment.md"
ls "$target"/comment.md "$target"/index.html 2>/dev/null || echo "no plots: neither commit declares any" >&2
