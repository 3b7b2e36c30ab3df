"""Beside the project's own workspace: throw-away ones, clones, the command, and a remote for colleagues."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from miniature import Project, edit, ran

from nashswarm.config import Scoring


@pytest.mark.pipeline
def test_experiment_in_a_temporary_workspace_leaves_the_own_one_alone(copy: Project) -> None:
    before = copy.files()
    output = copy.dvc("exp", "run", "--temp", "--name", "alone", "-S", "active.methods=[fp32]")
    assert ran(output) == ["methods", "report"]
    assert copy.files() == before
    assert "alone" in copy.dvc("exp", "list", "--name-only")


@pytest.mark.pipeline
def test_seeds_are_measured_beside_the_project(copy: Project) -> None:
    before = copy.files()
    words = ("reference", "--methods", "rtn4-g64", "--count", "2")
    copy.call(sys.executable, str(PROJECT / "tools/seeds.py"), *words)
    made = {name: data for name, data in copy.files().items() if name not in before}
    assert set(made) == {"metrics/seeds/reference/rtn4-g64.json"}
    assert before.items() <= copy.files().items()
    own = json.loads(before["metrics/reference/rtn4-g64.json"])
    found = json.loads(made["metrics/seeds/reference/rtn4-g64.json"])["quality"]["sampled"]
    first, second = (found["seeds"][seed] for seed in ("0", "1"))
    assert first["loss"] == own["quality"]["sampled"]["loss"]
    assert first["bits_per_weight"] == own["size"]["bits_per_weight"]
    assert first["loss"] != second["loss"]
    assert found["standard_deviation"]["loss"] == pytest.approx(abs(first["loss"] - second["loss"]) / 2**0.5, abs=1e-6)
    assert ran(copy.dvc("repro")) == ["report"]
    assert "Calibration seeds: reference on sampled" in (copy.root / "report/report.md").read_text(encoding="utf-8")
    assert "seeds/" not in copy.dvc("metrics", "show")  # DVC's tables pass over what no stage makes


@pytest.mark.pipeline
def test_seeds_are_not_measured_on_what_is_stale(copy: Project) -> None:
    copy.set(evaluation={"context": 16})
    before = copy.files()
    done = copy.call(sys.executable, str(PROJECT / "tools/seeds.py"), ok=False)
    assert done.returncode == 1
    assert "download@reference, baseline@reference: not up to date; run `dvc repro" in done.stderr
    assert copy.files() == before


@pytest.mark.pipeline
def test_seeds_are_not_measured_beside_what_older_code_made(copy: Project) -> None:
    edit(copy, "src/nashswarm/intervals.py")
    done = copy.call(sys.executable, str(PROJECT / "tools/seeds.py"), ok=False)
    assert done.returncode == 1
    assert "imports: not up to date; run `dvc repro download@reference baseline@reference` first" in done.stderr


@pytest.mark.pipeline
def test_the_command_makes_the_same_bytes(copy: Project) -> None:
    """Of a model and a text given by path, by the same settings; batches are the command's own."""
    method = "market-coded-6_0"
    own = {"source": "path", "calibration": "data/reference/calibration.txt", "test": "data/reference/test.txt"}
    copy.set(
        models={"own": {"source": "path", "path": "data/reference"}},
        corpora={"own": own},
        active={"models": ["own"], "calibration": "own", "corpora": ["own"], "methods": [method]},
        scoring={"batch_tokens": Scoring().batch_tokens},
    )
    copy.dvc("repro", f"pack@own-{method}")
    (copy.root / "method.yaml").write_text(yaml.safe_dump({method: copy.raw()["methods"][method]}), encoding="utf-8")
    words = "quantize data/reference --text data/reference/calibration.txt --tokens 512 --name own --method method.yaml"
    python = (sys.executable, "-m", "nashswarm.cli", *words.split(), "-o", "packed")
    copy.call(*python, PYTHONPATH="src")
    one, other = (
        {p.name: p.read_bytes() for p in (copy.root / path).iterdir()}
        for path in ("packed", f"data/packed/own/{method}")
    )
    assert one == other


@pytest.mark.pipeline
def test_fresh_clone_makes_the_same_bytes(miniature: Project, tmp_path: Path) -> None:
    miniature.git("clone", "--quiet", str(miniature.root), str(tmp_path / "clone"))
    clone = dataclasses.replace(miniature, root=tmp_path / "clone")
    output = clone.dvc("repro", "evaluate@reference-nash", "evaluate@reference-rtn4-g64")
    assert len(ran(output)) == 5 + 2 * 3
    assert clone.git("status", "--porcelain") == ""  # dvc.lock holds the hash of every output
    made = {n: b for n, b in clone.files().items() if n.startswith(("data/packed/", "metrics/"))}
    assert {f"data/packed/reference/{m}/packed.safetensors" for m in ("nash", "rtn4-g64")} < set(made)
    assert made == {n: b for n, b in miniature.files().items() if n in made}


# --- a remote for colleagues -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remote:
    """Where `dvc push` goes, what a process needs to get there, and its objects by name."""

    url: str
    settings: dict[str, str]
    environment: dict[str, str]
    sizes: Callable[[], dict[str, int]]
    overwrite: Callable[[str, bytes], object]


@pytest.fixture(params=["directory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    if request.param == "directory":
        store = tmp_path / "store"

        def overwrite(name: str, data: bytes) -> None:
            (store / name).chmod(0o644)
            (store / name).write_bytes(data)

        def sizes() -> dict[str, int]:
            return {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*") if p.is_file()}

        yield Remote(str(store), {"verify": "true"}, {}, sizes, overwrite)
        return
    pytest.importorskip("dvc_s3", reason="pip install 'nash-swarm[remote]'")
    server = pytest.importorskip("moto.server", reason="pip install 'nash-swarm[dev]'").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    import boto3  # type: ignore[import-not-found, unused-ignore]

    address = f"http://{host}:{port}"
    bucket = boto3.resource(
        "s3", endpoint_url=address, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    ).Bucket("swarm")
    bucket.create()
    yield Remote(
        "s3://swarm/store",
        {"endpointurl": address, "verify": "true"},
        keys,
        lambda: {o.key: o.size for o in bucket.objects.all()},
        lambda name, data: bucket.put_object(Key=name, Body=data),
    )
    server.stop()


@pytest.fixture
def pushed(copy: Project, remote: Remote, tmp_path: Path) -> Project:
    """A colleague's clone of a project whose outputs lie in the remote."""
    copy.dvc("remote", "add", "--default", "colleagues", remote.url)
    for key, value in remote.settings.items():
        copy.dvc("remote", "modify", "colleagues", key, value)
    copy.commit()
    copy.call("dvc", "push", **remote.environment)
    copy.git("clone", "--quiet", str(copy.root), str(tmp_path / "clone"))
    return dataclasses.replace(copy, root=tmp_path / "clone")


@pytest.mark.pipeline
def test_a_colleague_pulls_and_runs_nothing(pushed: Project, remote: Remote, miniature: Project) -> None:
    pushed.call("dvc", "pull", **remote.environment)
    assert ran(pushed.dvc("repro")) == []
    assert pushed.git("status", "--porcelain") == ""
    outputs = {n: b for n, b in miniature.files().items() if n.startswith(("data/", "report/", "metrics/"))}
    found = pushed.files()
    assert {n for n in outputs if n not in found} == {n for n in outputs if n.startswith("data/times/")}
    assert all(found[n] == b for n, b in outputs.items() if n in found)


@pytest.mark.pipeline
def test_a_damaged_object_of_the_remote_is_not_taken(pushed: Project, remote: Remote) -> None:
    sizes = remote.sizes()
    largest = max(sizes, key=lambda name: sizes[name])
    remote.overwrite(largest, bytes(sizes[largest]))
    done = pushed.call("dvc", "pull", ok=False, **remote.environment)
    assert done.returncode != 0
    assert "ERROR" in done.stdout + done.stderr
    assert all(b != bytes(sizes[largest]) for b in pushed.files().values())
