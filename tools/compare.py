"""Hold the metrics in the working tree against those of a commit, within tolerances for machines that round otherwise.

Sizes may differ by 0.01 % (entropy-coded streams follow late digits), those of single matrices by 1 %,
losses by 1e-4 nats, also when summed over a block of windows (some 2,000 tokens), KL by 1 % and 1e-6 nats. Times, in
metrics/benchmarks, do not repeat and are passed over.

Another make of processor gives scores other late digits, and codes that follow each other's errors (gptq, coded, tiles)
then go other ways, as with another calibration seed. Where dvc.lock says that the same inputs gave other scores, those
methods are held to wider tolerances, and figures that swing with single texts (the paper's protocol, blocks of windows,
the largest KL) to none; that is said.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

# Part of a key -> (relative, absolute) tolerance; the first that fits counts.
TOLERANCES = {
    "histogram": (0.001, 2.0),
    "tensors": (0.01, 1e-6),
    "window_blocks": (1e-4, 0.2),
    "bytes": (1e-4, 64.0),
    "parts": (1e-3, 64.0),
    "kl_": (0.01, 1e-6),
    "agreement": (0.0, 1e-3),
    "percent": (0.02, 5e-3),
    "loss": (1e-4, 1e-4),
    "perplexity": (1e-3, 0.0),
}
DEFAULT = (1e-3, 1e-6)
ANY = (float("inf"), float("inf"))
ELSEWHERE = {
    "paper": ANY,
    "window_blocks": ANY,
    "tokens_to_resolve": ANY,
    "kl_max": ANY,
    "duality_gap": ANY,
    "histogram": (0.001, 2.0),
    "tensors": (0.05, 0.02),
    "bytes": (1e-3, 64.0),
    "parts": (0.02, 64.0),
    "kl_": (0.05, 1e-4),
    "agreement": (0.0, 5e-3),
    "delta_loss": (0.05, 2e-3),
    "loss": (1.5e-3, 0.0),
    "perplexity": (5e-3, 0.0),
}
FOLLOWING = {"gptq", "coded", "tiles"}  # codecs whose codes depend on errors before them
TIMES = "metrics/benchmarks/"


def main(revision: Annotated[str, typer.Argument(help="the commit to compare with")] = "HEAD") -> None:
    """Print every figure that is off and every file that the commit lacks, and exit with 1 if there is any."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", revision, "metrics/"], check=False, capture_output=True, text=True
    )
    if listed.returncode:
        print(listed.stderr.strip())
        sys.exit(2)
    names = [name for name in listed.stdout.split() if not name.startswith(TIMES)]
    if not names:
        print(f"{revision} has no metrics: nothing was compared")
        sys.exit(1)
    off, figures, elsewhere = [], 0, swinging(revision)
    for name in names:
        committed = dict(flat(json.loads(subprocess.check_output(["git", "show", f"{revision}:{name}"]))))
        fresh = dict(flat(json.loads(Path(name).read_text()))) if Path(name).is_file() else {}
        figures += len(committed)
        off += [f"{name}: {key}: {why}" for key, why in differences(committed, fresh, elsewhere.get(name, TOLERANCES))]
    made = {name for path in Path("metrics").rglob("*.json") if not (name := path.as_posix()).startswith(TIMES)}
    off += [f"{name}: not in {revision}, so it was compared with nothing" for name in sorted(made - {*names})]
    if elsewhere:
        print(
            f"This machine's scores have other late digits than {revision}'s: {len(elsewhere)} files are held to less"
        )
    print("\n".join(off) or f"{figures} figures in {len(names)} files agree with {revision}")
    sys.exit(bool(off))


def swinging(revision: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Files whose figures may differ more, as their model's scores did though all that they depend on is the same."""
    shown = subprocess.run(["git", "show", f"{revision}:dvc.lock"], check=False, capture_output=True, text=True)
    if shown.returncode or not Path("dvc.lock").is_file():
        return {}
    old, new = (yaml.safe_load(text)["stages"] for text in (shown.stdout, Path("dvc.lock").read_text()))
    methods = yaml.safe_load(Path("params.yaml").read_text())["methods"]
    following = [name for name, block in methods.items() if block["codec"] in FOLLOWING]
    found = {}
    for stage in (name for name in new if name.startswith("score@") and name in old):
        before, now = old[stage], new[stage]
        if (
            before["deps"] == now["deps"]
            and before.get("params") == now.get("params")
            and before["outs"] != now["outs"]
        ):
            model = stage.partition("@")[2]
            found |= {f"metrics/{model}/{method}.json": ELSEWHERE for method in following}
    return found


def flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys and list places -> leaves, as 'a.b.0'."""
    if isinstance(document, dict | list):
        pairs = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in pairs:
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, document


def differences(
    committed: dict[str, Any], fresh: dict[str, Any], tolerances: dict[str, tuple[float, float]]
) -> Iterator[tuple[str, str]]:
    """Keys whose values differ by more than their tolerance, and how."""
    for key in sorted(committed.keys() | fresh.keys()):
        old, new = committed.get(key, "nothing"), fresh.get(key, "nothing")
        if old == new:
            continue
        relative, absolute = next((t for part, t in tolerances.items() if part in key), DEFAULT)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (old, new)):
            if (relative, absolute) != ANY or "nothing" in (old, new):
                yield key, f"{old} became {new}"
            continue
        if abs(new - old) > max(relative * abs(old), absolute):
            yield key, f"{old} became {new}, more than {relative:g} relative and {absolute:g} absolute"


if __name__ == "__main__":
    typer.run(main)
