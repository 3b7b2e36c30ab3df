"""Another tool's turn: started in an environment of its own, its failure recorded, its weights completed and counted.

The pipeline's process writes a task to a scratch directory and starts the peers' interpreter on this same module
(`python -m nashswarm.peering`); that one runs the tool and writes what came of it beside the task. Any end but a good
one becomes the reason for which the peer is listed as not run. What a tool leaves alone is stored as our baselines
store it: matrices in groups of 64 by 4 bits, vectors as float16.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from nashswarm import artifacts
from nashswarm.artifacts import PeerRecord
from nashswarm.config import Peer, load_room, parse_peer
from nashswarm.models import Checkpoint
from nashswarm.processes import die_with_parent
from nashswarm.recipes import TABLES, peer_document
from nashswarm.types import Choice, Job, NashSwarmError, PeerJob, PeerWeights, Statistics

PYTHON = "NASHSWARM_PEERS_PYTHON"  # the environment variable that names another interpreter
DEFAULT = ".venv-peers/bin/python"
BUILD = "`make peers` builds the environment"
TABLE_BITS, TABLE_GROUP = 4, 64  # as rtn and gptq in params.yaml have embeddings
LONGEST = 300  # characters of a reason


class PeerError(NashSwarmError):
    """Another tool was not run; the message says why, and what to do."""


# --- in the pipeline's process -------------------------------------------------------------------------------------


def run(
    peer: Peer, job: PeerJob, root: Path, statistics: Callable[[str], Statistics]
) -> tuple[PeerRecord, dict[str, np.ndarray]]:
    """What came of a peer: its record, and every parameter of the model, float32; none where it was not run.

    Arguments: `root`, the project's, below which the peers' environment lies; `statistics` of a matrix by name.
    """
    settings = {k: v for k, v in peer_document(peer).items() if k != "tool"}
    try:
        made = _elsewhere(peer, job, interpreter(root))
        weights, parts, left = complete(job, made, statistics)
    except PeerError as error:
        reason = str(error).replace(f"{root.resolve()}{os.sep}", "")
        return PeerRecord(peer.tool, settings, reason=reason), {}
    notes = made.notes
    if left:
        stored = f"stored in groups of {TABLE_GROUP} by {TABLE_BITS} bits"
        notes = (*notes, f"left alone by it, {stored}: {', '.join(left)}")
    return PeerRecord(peer.tool, settings, made.version, notes, None, parts), weights


def interpreter(root: Path) -> Path:
    """The peers' Python. Raises PeerError where there is none."""
    named = os.environ.get(PYTHON)
    path = Path(named) if named else root / DEFAULT
    if not path.is_file():
        raise PeerError(f"{named or DEFAULT} is not there; {BUILD}, or set {PYTHON} to its interpreter")
    return path.absolute()


def _elsewhere(peer: Peer, job: PeerJob, python: Path) -> PeerWeights:
    """Run a tool by another interpreter. Raises PeerError where it fails, with its last words."""
    request: dict[str, Any] = {"peer": peer_document(peer), "directory": str(job.directory.resolve())}
    request |= {"context": job.context, "threads": job.threads}
    with tempfile.TemporaryDirectory() as scratch:
        artifacts.write_request(Path(scratch), request, job.index, job.ids)
        done = subprocess.run(
            [str(python), "-m", "nashswarm.peering", scratch],
            cwd=scratch,  # some tools leave logs where they are started
            env=_environment(job.threads),
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
        )
        if done.returncode < 0:
            raise PeerError(f"{peer.tool} was ended by signal {-done.returncode}")
        if done.returncode:
            raise PeerError(_last_words(done.stderr or done.stdout))
        made = artifacts.read_peer(Path(scratch))
        matrices = {k: torch.from_numpy(v) for k, v in artifacts.read_peer_weights(Path(scratch)).items()}
    return PeerWeights(matrices, made.parts, made.version or "", made.notes)


def _environment(threads: int) -> dict[str, str]:
    """This same code, no network, fixed threads and hashes; nothing of the pipeline's own virtual environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONHOME")}
    own = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PYTHONHASHSEED": "0"}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
    return {**kept, **own}


def _last_words(text: str) -> str:
    """The last line of what a process printed, which of a traceback is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = lines[-1].removeprefix("error: ") if lines else "it ended without a word"
    if words.startswith(("ModuleNotFoundError", "ImportError")):
        words += f"; {BUILD}"
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def complete(
    job: PeerJob, made: PeerWeights, statistics: Callable[[str], Statistics]
) -> tuple[dict[str, np.ndarray], dict[str, int], list[str]]:
    """All parameters, float32, the bytes stored for them by part, and the matrices that the tool left alone.

    Raises PeerError for a matrix that is none of the model's, misshapen, or not finite.
    """
    _check(job, made)
    codec, checkpoint = load_room("codecs", TABLES), Checkpoint.open(job.directory, job.index)
    weights, parts, left = {}, Counter(made.parts), []
    stored: dict[str, np.ndarray] = {}
    for tensor in job.index.tensors:
        if tensor.name in made.matrices:
            weights[tensor.name] = made.matrices[tensor.name].numpy()
            continue
        task = Job(tensor, checkpoint.tensor(tensor), Choice(TABLE_BITS), None, statistics(tensor.name))
        packed = codec.encode(task, codec.Settings(group=TABLE_GROUP))
        weights[tensor.name] = codec.decode(packed).numpy()
        stored |= {f"{tensor.name}.{part}": array for part, array in packed.arrays.items()}
        left.append(tensor.name)
    for vector in job.index.vectors:
        half = checkpoint.vector(vector).numpy().astype(np.float16)
        weights[vector.name], stored[f"{vector.name}.vectors"] = half.astype(np.float32), half
    for name, array in stored.items():
        parts[name.rpartition(".")[2]] += array.nbytes
    parts["headers"] += len(save(stored)) - sum(array.nbytes for array in stored.values())
    return weights, dict(parts), left


def _check(job: PeerJob, made: PeerWeights) -> None:
    shapes = {tensor.name: tensor.shape for tensor in job.index.tensors}
    for name, matrix in made.matrices.items():
        if name not in shapes:
            raise PeerError(f"{name}: the tool made a matrix that the model has not")
        if tuple(matrix.shape) != shapes[name]:
            raise PeerError(f"{name}: the tool made {list(matrix.shape)}, expected {list(shapes[name])}")
        if not bool(matrix.isfinite().all()):
            raise PeerError(f"{name}: the tool made weights that are not finite")


# --- in the peers' process -----------------------------------------------------------------------------------------


def main(scratch: Path) -> None:
    """Run the tool that request.json names; write what it made beside it."""
    die_with_parent()
    request, index, ids = artifacts.read_request(scratch)
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    peer = parse_peer("peer", request["peer"])
    job = PeerJob(Path(request["directory"]), index, ids, request["context"], request["threads"])
    made = load_room("peers", peer.tool).quantize(job, peer.settings)
    record = PeerRecord(peer.tool, dataclasses.asdict(peer.settings), made.version, made.notes, None, made.parts)
    artifacts.write_peer(scratch, record, {k: v.detach().numpy() for k, v in made.matrices.items()})


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except NashSwarmError as error:
        sys.exit(f"error: {error}")
