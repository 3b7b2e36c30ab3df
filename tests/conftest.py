"""Tiny models with random weights, made once for a session, and the miniature that DVC ran, made once for all workers.

GPT-2 (Conv1D, tied), OPT (tied, offset positions), Llama (grouped queries, a head of its own). Everything is seeded and
offline. Heavy imports happen inside fixtures, so that tests without models start at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

if TYPE_CHECKING:
    import torch
    from miniature import Project

    from nashswarm.config import Method, Params
    from nashswarm.corpora import TokenizedSplit
    from nashswarm.packed import PackedModel
    from nashswarm.quantize import Model
    from nashswarm.types import PackedTensor, Statistics, TensorSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in nashswarm.threads
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, threads cost more than they give

PROJECT = Path(__file__).parents[1]
FAMILIES = ("gpt2", "opt", "llama")
CONTEXT = 32  # tokens
WIDTH = 72  # no multiple of 64, so that groups are ragged
VOCABULARY = 320
EOS = "<|end|>"

_OFTEN = {f"market-coded-{b}" for b in ("2_0", "2_5", "3_5", "4_0", "5_0", "6_0")}
_LONG = {f"market-coded-{b}-tuned" for b in ("2_5", "3_0")}  # test_tuning has them with fewer steps
# Of params.yaml, one for each way through the code: of a codec's many budgets the least, the usual and the most.
METHODS = [n for n in yaml.safe_load((PROJECT / "params.yaml").read_text())["methods"] if n not in _OFTEN | _LONG]

Checkpoints = Callable[..., Path]  # (family, dtype="float32", sharded=False) -> model directory
Models = Callable[[str], "Model"]  # family -> quantize.Model with statistics


def no_progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """A progress bar that shows nothing."""
    return items


def tiny_text(lines: int, seed: int) -> list[str]:
    """Lines of invented words, 3 to 25 each: skewed frequencies, some lines of 20 characters or fewer."""
    rng = np.random.default_rng(seed)
    syllables = ["na", "shi", "o", "ver", "bit", "la", "mar", "ket", "é", "swa", "rm", "to"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(60)]
    weights = 1 / np.arange(1, 61)
    return [" ".join(rng.choice(words, rng.integers(3, 26), p=weights / weights.sum())) for _ in range(lines)]


@pytest.fixture
def isolated_modes() -> Iterator[None]:
    """Gradient and inference modes that a test leaves behind end with it."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> directory with tokenizer.json; OPT's and Llama's begin every text with a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_text(200, seed=1), trainer)

    @cache
    def make(family: str) -> Path:
        if family != "gpt2":
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
            )
        directory = tmp_path_factory.mktemp(f"tokenizer-{family}")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(directory)
        return directory

    make("gpt2")  # before the others change the post-processor
    return make


def tiny_config(family: str) -> Any:
    """The transformers config of a tiny model."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        return GPT2Config(n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=4, initializer_range=0.2, **common)
    if family == "opt":
        return OPTConfig(
            max_position_embeddings=CONTEXT,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=100,
            init_std=0.2,
            **common,
        )
    return LlamaConfig(
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **common,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizers: Callable[[str], Path]) -> Checkpoints:
    """(family, dtype="float32", sharded=False) -> directory of that tiny model; do not write to it."""

    @cache
    def make(family: str, dtype: str = "float32", sharded: bool = False) -> Path:
        import shutil

        import torch
        from transformers import AutoModelForCausalLM

        directory = tmp_path_factory.mktemp(f"{family}-{dtype}{'-sharded' * sharded}")
        torch.manual_seed(FAMILIES.index(family))
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # biases of 0 and norms of 1 would hide mistakes
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) / 8)
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="100KB" if sharded else "1GB")
        for file in tokenizers(family).iterdir():
            shutil.copyfile(file, directory / file.name)
        return directory

    return make


@pytest.fixture(scope="session")
def split(tokenizers: Callable[[str], Path]) -> Callable[..., TokenizedSplit]:
    """(family, seed=2) -> a tokenized split of about 40 windows."""

    @cache
    def make(family: str, seed: int = 2) -> TokenizedSplit:
        from nashswarm.corpora import tokenize
        from nashswarm.models import load_tokenizer

        return tokenize(tiny_text(40, seed), load_tokenizer(tokenizers(family)))

    return make


def stored(directory: Path, gathered: Iterable[tuple[TensorSpec, Statistics]]) -> Callable[..., Statistics]:
    """Write statistics into a directory. Returns: what reads them."""
    from nashswarm import artifacts

    for tensor, found in gathered:
        artifacts.write_statistics(directory, tensor.name, found)
    return partial(artifacts.read_statistics, directory)


@pytest.fixture(scope="session")
def quantizable(
    checkpoint: Checkpoints, split: Callable[..., TokenizedSplit], tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """family -> quantize.Model of the tiny model, float32, with statistics gathered on a tiny text."""

    @cache
    def make(family: str) -> Model:
        from nashswarm import artifacts, models, quantize, statistics
        from nashswarm.config import Scoring

        directory = checkpoint(family)
        index = models.describe(directory)
        original = models.load_original(directory, index)
        ids = split(family, seed=3).ids
        scoring = Scoring(tokens=512, batch_tokens=256)
        gathered = statistics.gather(lambda: original, index, ids, scoring, no_progress)
        read = stored(tmp_path_factory.mktemp(f"{family}-statistics"), gathered)
        files = {name: artifacts.sha256_file(directory / name) for name in models.checkpoint_files(directory)}
        record = artifacts.SourceRecord("path", str(directory), None, None, files)
        return quantize.Model(family, index, record, models.Checkpoint.open(directory, index), read)

    return make


@pytest.fixture(scope="session")
def params() -> Params:
    """The project's own params.yaml."""
    from nashswarm.config import load_params

    return load_params(PROJECT / "params.yaml")


@dataclass(frozen=True)
class Packed:
    """A packed tiny model, and what `quantize` says that it holds."""

    method: Method
    directory: Path
    opened: PackedModel
    meant: dict[str, torch.Tensor]  # matrix -> as encoded in memory; empty for a codec that stores nothing
    vectors: dict[str, np.ndarray]  # name -> as meant to be stored, float32: a correction may have moved it


@pytest.fixture(scope="session")
def packed(
    tmp_path_factory: pytest.TempPathFactory,
    quantizable: Models,
    params: Params,
    split: Callable[..., TokenizedSplit],
) -> Callable[[str, str], Packed]:
    """(family, method of params.yaml) -> that tiny model, packed; do not write to it."""

    @cache
    def make(family: str, name: str) -> Packed:
        from nashswarm import quantize
        from nashswarm.config import load_room
        from nashswarm.packed import open_packed

        model, method = quantizable(family), params.methods[name]
        allocation = quantize.allocate(model, method, no_progress)
        directory = tmp_path_factory.mktemp("packed") / name
        rounds: list[tuple[dict[str, PackedTensor], quantize.Course]] = []
        encode = quantize.encode

        def watch(*arguments: Any) -> Iterator[tuple[str, PackedTensor]]:
            rounds.append(({}, arguments[3]))
            for tensor, item in encode(*arguments):
                rounds[-1][0][tensor] = item
                yield tensor, item

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantize, "encode", watch)
            quantize.pack(model, method, allocation, split(family, seed=3).ids, directory, no_progress)
        encoded, course = rounds[-1]
        if method.codec == "source":
            return Packed(method, directory, open_packed(directory), {}, {})
        meant = {tensor: load_room("codecs", p.codec).decode(p) for tensor, p in encoded.items()}
        vectors = {v.name: course.vector(v.name) for v in model.index.vectors}
        return Packed(method, directory, open_packed(directory), meant, vectors)

    return make


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    """The command, called within a test, computes with two threads; the next test has as many as before again."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else int(os.environ["OMP_NUM_THREADS"])
    yield
    if "torch" in sys.modules and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoints) -> Project:
    """The miniature, run once before witnesses and committed: the first worker that asks makes it for all.

    Read it or copy it: DVC and `git status` write below .dvc and .git, and another worker may be copying those.
    """
    from filelock import FileLock
    from miniature import Project, make_run

    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # each worker has a folder in it
    note = session / "miniature.json"
    with FileLock(session / "miniature.lock"):
        if not note.is_file():
            project = make_run(tmp_path_factory.mktemp("miniature"), checkpoint("gpt2"))
            note.write_text(json.dumps([str(project.root), str(project.home), project.first]), encoding="utf-8")
        root, home, first = json.loads(note.read_text(encoding="utf-8"))
    return Project(Path(root), Path(home), first)


@pytest.fixture
def copy(miniature: Project, tmp_path: Path) -> Project:
    """A copy of the miniature, outputs and cache included, to change at will."""
    return miniature.copy(tmp_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run DVC take longest, so they come first: what starts last, a worker does while others wait.

    Of these, first those that do without the miniature: it is made by one worker, for which others would wait.
    """
    long = {item.path for item in items if item.get_closest_marker("pipeline")}
    shared = {item.path for item in items if "miniature" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path not in long, item.path in shared))
