"""The reference model's script, end to end at toy size: train, interrupt and resume, sample, evaluate."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "tools" / "train_reference.py"
CONTEXT = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Operations this small lose more to waking threads than they gain: 60 s against 10 s on two busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of random three-letter words: soon learned, yet no two windows of the model's own text alike."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(20_000)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\r\n".join(" ".join(words[i : i + 5]) for i in range(0, len(words), 5)), encoding="utf-8")
    return path


def plan(script: ModuleType, arch: str, steps: int):
    shape = script.Shape(arch=arch, layers=1, width=32, heads=2, kv_heads=1, inner=64, context=CONTEXT)
    return script.Plan(shape=shape, steps=steps, batch_size=32, learning_rate=0.02, vocab_size=260, weight_decay=0.1)


def train(script: ModuleType, corpus: Path, out: Path, arch: str, steps: int, **kwargs) -> None:
    script.train_reference(
        plan(script, arch, steps), corpus=corpus, validation=corpus, out=out, device=CPU, **kwargs
    )  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request: pytest.FixtureRequest, script: ModuleType, corpus: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    train(script, corpus, folder, request.param, 150)
    script.sample_reference(folder, script.SamplePlan(streams=3, windows=4), seed=7, device=CPU)
    script.evaluate_reference(folder, {"corpus": corpus}, device=CPU)
    return folder


def test_folder_is_complete_and_loads_through_transformers(trained: Path, script: ModuleType) -> None:
    made = {path.name for path in trained.iterdir()}
    assert made == {
        "README.md", "calibration.txt", "config.json", "loss_curve.csv", "loss_curve.png", "model.safetensors",
        "provenance.json", "test.txt", "tokenizer.json", "tokenizer_config.json", "validation.txt",
    }  # fmt: skip
    assert all(t.dtype == torch.float16 for t in load_file(trained / "model.safetensors").values())
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.is_fast
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    x = torch.tensor([tokenizer("abc\n\nfed cba")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    ours = script.load_model(trained, CPU)
    with torch.no_grad():  # the usual causal mask against the kernel's own flag: equal but for rounding
        torch.testing.assert_close(theirs(x).logits, ours(x).logits, atol=1e-4, rtol=1e-4)


def test_sampled_texts_come_back_token_for_token(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for split in ("calibration", "validation", "test"):
        text = (trained / f"{split}.txt").read_text(encoding="utf-8")
        joined = "\n\n".join(line for line in text.split("\n") if line.strip())
        assert joined + "\n" == text
        ids = tokenizer(joined)["input_ids"]
        assert len(ids) == 3 * 4 * CONTEXT
        assert tokenizer.decode(ids) == joined


def test_sampling_again_gives_the_same_text(trained: Path, script: ModuleType) -> None:
    model, tokenizer = script.load_model(trained, CPU), script.Tokenizer.from_file(str(trained / "tokenizer.json"))
    text, _ = script.sample_text(model, tokenizer, script.SamplePlan(streams=3, windows=4), seed=8)
    assert text + "\n" == (trained / "validation.txt").read_text(encoding="utf-8")


def test_loss_is_that_of_transformers_window_by_window(trained: Path, script: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(trained)(script.read_text(trained / "test.txt"), return_tensors="pt").input_ids[
        0
    ]
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in ids.split(CONTEXT)]
    mine = script.mean_loss(script.load_model(trained, CPU), torch.cat([ids, ids[:5]]), CONTEXT, batch=5)
    assert mine == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # float32 logits in another batch order


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_resuming_gives_the_weights_of_an_undisturbed_run(
    arch: str, script: ModuleType, corpus: Path, tmp_path: Path
) -> None:
    train(script, corpus, tmp_path / "whole", arch, 12)
    checkpoint = tmp_path / "checkpoint"
    train(script, corpus, tmp_path / "parts", arch, 12, checkpoint=checkpoint, stop_after=5)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train(script, corpus, tmp_path / "parts", arch, 12, checkpoint=checkpoint)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_another_plan_cannot_take_over_a_checkpoint(script: ModuleType, corpus: Path, tmp_path: Path) -> None:
    train(script, corpus, tmp_path, "gpt2", 4, checkpoint=tmp_path / "c", stop_after=2)
    with pytest.raises(ValueError, match="another plan"):
        train(script, corpus, tmp_path, "gpt2", 5, checkpoint=tmp_path / "c")


def test_a_pass_shows_every_window_once_and_the_next_pass_others(script: ModuleType) -> None:
    ids = torch.arange(1000, dtype=torch.int32)
    batches = script.Batches(ids, context=8, batch_size=4, seed=1)
    passes = [
        torch.cat([batches(p * batches.steps_per_pass + i) for i in range(batches.steps_per_pass)]) for p in range(2)
    ]
    for windows in passes:
        assert windows.shape[1] == 9
        assert torch.equal(windows - windows[:, :1], torch.arange(9).expand_as(windows))
        starts = windows[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((len(starts) - 1,), 8))
    assert not torch.equal(passes[0], passes[1])


def test_steps_or_minutes_but_not_both(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="either"):
        replace(script.Plan(steps=1), minutes=1.0)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("abc", True),
        ("abc\n\nabc", True),
        ("abc\nabc", False),
        ("abc\n\n\nabc", False),
        ("abc ", False),
        ("abc\n\n", False),
        ("\n\nabc", False),
        ("ab\x07c", False),
        ("ab\u00a0c", False),
    ],
)
def test_a_passage_takes_only_text_that_round_trips(script: ModuleType, text: str, ok: bool) -> None:
    tokenizer = script.train_tokenizer("abc abc\n\nabc abc", 262)
    assert script.Stream(opening=None).accepts(tokenizer, script.encode(tokenizer, text)) is ok


def test_a_passage_refuses_tokens_that_its_text_would_not_give(script: ModuleType) -> None:
    tokenizer = script.train_tokenizer("abc abc\n\nabc abc", 262)
    letters = [tokenizer.token_to_id(c) for c in "abc"]
    assert len(script.encode(tokenizer, "abc")) < 3
    assert not script.Stream(opening=None).accepts(tokenizer, letters)
