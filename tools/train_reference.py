"""Train the small reference model of `data/reference`, let it write its own texts, and measure both.

Subcommands, each of which reads what the ones before wrote into the same folder:

    train     corpus -> tokenizer.json, tokenizer_config.json, config.json, model.safetensors (fp16), loss_curve.*
    sample    model -> calibration.txt, validation.txt, test.txt, drawn at temperature 1 from fixed seeds
    evaluate  model + held-out texts -> the losses, and README.md
    readme    README.md alone, after a change of its words

Facts that a later step needs (seeds, steps, seconds, losses) are kept in `provenance.json`, so that README.md can be
written again at any time. One text protocol holds throughout: lines without carriage returns, blank ones dropped,
joined by blank lines, tokenised once, cut into windows of the model's context that do not overlap.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import lzma
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

log = logging.getLogger("train_reference")
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

Arch = Literal["gpt2", "llama"]
END_OF_TEXT = "<|endoftext|>"
BREAK = "\n\n"
SPLITS = ("calibration", "validation", "test")
WEIGHTS, CONFIG, TOKENIZER, PROVENANCE = "model.safetensors", "config.json", "tokenizer.json", "provenance.json"

# With an explicit mask, scaled_dot_product_attention cannot take its flash kernel, and under torch.compile transformers
# may build that mask even where nothing is padded. Nothing is here: no mask, and the kernel's own causal flag.
CAUSAL = "causal_without_mask"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL, lambda *_args, **_kwargs: None)


# ------------------------------------------------------------------------------------------------------------- text


def join_lines(text: str) -> str:
    r"""Return the text as every step sees it: no "\r", no blank lines, the other lines joined by blank lines."""
    return BREAK.join(line for line in text.replace("\r", "").split("\n") if line.strip())


def read_text(path: Path) -> str:
    """Read a UTF-8 file, unpacked if it ends in `.xz`, in the joined form of `join_lines`."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return join_lines(raw.decode("utf-8"))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------- tokenizer


def chunks_of_lines(text: str, lines_each: int = 2000) -> list[str]:
    """Cut a joined text at line breaks, each break kept at the head of the chunk that it opens.

    GPT-2's splitting rule cuts a break in two where a word follows, but leaves it whole at the very end; so a break
    must lead a chunk. Unlike the text in one piece, chunks can be tokenised on all cores at once.
    """
    lines = text.split(BREAK)
    chunks = [BREAK.join(lines[i : i + lines_each]) for i in range(0, len(lines), lines_each)]
    return chunks[:1] + [BREAK + chunk for chunk in chunks[1:]]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's splitting rule, no prefix space) of `vocab_size` tokens; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chunks_of_lines(text), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that lets `AutoTokenizer` load it as a fast tokenizer."""
    tokenizer.save(str(folder / TOKENIZER))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    write_json(folder / "tokenizer_config.json", settings)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a text in one piece, with no special tokens added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def encode_corpus(tokenizer: Tokenizer, text: str) -> Tensor:
    """Tokenise a long text chunk by chunk on all cores; int32 ids of shape (tokens,)."""
    encodings = tokenizer.encode_batch_fast(chunks_of_lines(text), add_special_tokens=False)
    return torch.cat([torch.tensor(e.ids, dtype=torch.int32) for e in encodings])


# ------------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model. The Llama style has grouped keys and a gated inner layer; the GPT-2 style needs neither."""

    arch: Arch = "gpt2"
    layers: int = 8
    width: int = 256
    heads: int = 4
    kv_heads: int = 2  # Llama style only
    inner: int = 704  # Llama style only: 8/3 of the width, rounded up to a multiple of 64; GPT-2's is 4 widths
    context: int = 256


def build_config(shape: Shape, vocab_size: int) -> GPT2Config | LlamaConfig:
    """Return the transformers configuration for a shape; no dropout."""
    ends = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if shape.arch == "gpt2":
        return GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=shape.context,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=True,
            architectures=["GPT2LMHeadModel"], **ends,
        )  # fmt: skip
    return LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, max_position_embeddings=shape.context,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], **ends,
    )  # fmt: skip


def build_model(shape: Shape, vocab_size: int, seed: int) -> PreTrainedModel:
    """Return a freshly initialised fp32 model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(build_config(shape, vocab_size), attn_implementation=CAUSAL)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights rounded to fp16, a tied head once, and a configuration free of library versions."""
    tied = model.config.tie_word_embeddings
    kept = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    tensors = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in kept.items()}
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError("a weight is not finite in fp16: training diverged; try a lower --learning-rate")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = model.config.to_diff_dict() | {"dtype": "float16"}
    settings["tie_word_embeddings"] = tied
    settings.pop("transformers_version", None)
    write_json(folder / CONFIG, dict(sorted(settings.items())))


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load a stored model for measurement: the fp16 weights, computed in fp32."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=CAUSAL)
    missing, unexpected = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    lost = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if lost or unexpected:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: missing {sorted(lost)}, unexpected {unexpected}")
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Loss of a model on one text by the standard protocol, and the counts that it rests on."""

    nats_per_token: float
    tokens: int
    windows: int
    bytes: int

    @property
    def tokens_per_byte(self) -> float:
        """All tokens of the text over its UTF-8 bytes."""
        return self.tokens / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """Compare this one between tokenizers: nats per token times tokens per byte over ln 2."""
        return self.nats_per_token * self.tokens_per_byte / math.log(2)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: Tensor, context: int, batch: int = 64) -> float:
    """Return the mean negative log-likelihood in nats over all tokens but the first of each window.

    Arguments:
        model: a causal language model; its logits are read in its own precision, then in fp32.
        ids: token ids, shape (tokens,). They are cut into windows that do not overlap; a remainder is left out.
        context: tokens in a window.
        batch: windows in one forward pass.
    """
    windows = ids[: len(ids) // context * context].view(-1, context).long()
    total = 0.0
    for x in windows.split(batch):  # (B, T)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        losses = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        total += losses.double().sum().item()
    return total / (len(windows) * (context - 1))


def measure(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, device: torch.device) -> TextLoss:
    """Measure a model on a text file."""
    text = read_text(path)
    ids = torch.tensor(encode(tokenizer, text), device=device)
    context = model.config.max_position_embeddings
    loss = mean_loss(model, ids, context)
    return TextLoss(loss, tokens=len(ids), windows=len(ids) // context, bytes=len(text.encode()))


# --------------------------------------------------------------------------------------------------------- training

WARMUP_STEPS = 100
TIMED_STEPS = range(20, 60)  # with --minutes: late enough for compilation to be over, within the warmup
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train. `steps` or `minutes`: the latter becomes steps once the speed is known."""

    shape: Shape = field(default_factory=Shape)
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 256  # windows in a step
    learning_rate: float = 6e-3
    weight_decay: float = 0.8  # of the matrices inside the blocks; ten passes: 3.267 nats held out, 3.291 at 0.3
    seed: int = 1
    vocab_size: int = 4096
    eval_every: int = 250  # steps
    save_every: int = 1000  # steps

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either --steps or --minutes")


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A row of loss_curve.csv: mean training loss since the row before, validation loss now (nats per token)."""

    step: int
    tokens: int
    learning_rate: float
    train_loss: float
    validation_loss: float


@dataclass(slots=True)
class State:
    """All that a restart needs beside the weights: with the seed, `step` fixes the position in the data."""

    step: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)


class Batches:
    """Training windows in an order that is a pure function of the seed and the step.

    Each pass over the corpus shifts the windows by a random offset, so that no pass sees the same windows as another,
    and permutes them. A window has context + 1 tokens: every one but the first is a target.
    """

    def __init__(self, ids: Tensor, *, context: int, batch_size: int, seed: int) -> None:
        self.ids, self.context, self.batch_size, self.seed = ids, context, batch_size, seed
        self.steps_per_pass = (len(ids) - 2 * context) // context // batch_size
        if self.steps_per_pass < 1:
            raise ValueError(f"the corpus has {len(ids):,} tokens, less than one batch of {batch_size} x {context}")
        self._pass, self._starts = -1, ids.new_empty(0)

    def __call__(self, step: int) -> Tensor:
        """Return the windows of a step, int64, shape (batch_size, context + 1)."""
        number, index = divmod(step, self.steps_per_pass)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            offset = torch.randint(self.context, (), generator=generator)
            order = torch.randperm(self.steps_per_pass * self.batch_size, generator=generator)
            self._pass, self._starts = number, (order * self.context + offset).to(self.ids.device)
        starts = self._starts[index * self.batch_size :][: self.batch_size]
        return self.ids[starts[:, None] + torch.arange(self.context + 1, device=starts.device)].long()


def build_optimizers(model: PreTrainedModel, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, gains and biases.

    With "match_rms_adamw" an update of Muon has AdamW's usual size (0.2 root mean square), so one learning rate serves
    both. Only those matrices decay. (K. Jordan, Muon, 2024; J. Liu et al., arXiv 2502.16982.)
    """
    named = dict(model.named_parameters())
    inner = [p for k, p in named.items() if p.ndim == 2 and (".h." in k or ".layers." in k)]
    chosen = {id(p) for p in inner}
    outer = [p for p in named.values() if id(p) not in chosen]
    fused = outer[0].device.type == "cuda"
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]


def learning_rate_factor(step: int, total_steps: int | None) -> float:
    """Linear warmup, then linear decay to zero at the end; while the end is unknown, only the warmup."""
    warmup = (step + 1) / WARMUP_STEPS
    return min(warmup, 1.0) if total_steps is None else min(warmup, 1 - step / total_steps)


def cross_entropy(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean loss in nats per token over windows of shape (B, T + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@dataclass(slots=True)
class Trainer:
    """A training run: the model, its optimizers, its data and its state, with checkpoints between them."""

    plan: Plan
    model: PreTrainedModel
    batches: Batches
    validation: Tensor
    checkpoint: Path | None
    optimizers: list[torch.optim.Optimizer] = field(init=False)
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.optimizers = build_optimizers(self.model, self.plan.learning_rate, self.plan.weight_decay)
        self.state.total_steps = self.plan.steps

    @property
    def device(self) -> torch.device:
        """Where the data lie."""
        return self.batches.ids.device

    def save(self) -> None:
        """Write a checkpoint; the rename makes it whole or absent, whenever the run is killed."""
        if self.checkpoint is None:
            return
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        content = {
            "plan": asdict(self.plan),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "state": asdict(self.state),
        }
        torch.save(content, self.checkpoint / "new.pt")
        (self.checkpoint / "new.pt").replace(self.checkpoint / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one, after checking that it belongs to this plan."""
        if self.checkpoint is None or not (self.checkpoint / "checkpoint.pt").exists():
            return
        content = torch.load(self.checkpoint / "checkpoint.pt", map_location=self.device, weights_only=True)
        if content["plan"] != asdict(self.plan):
            raise ValueError(f"{self.checkpoint} was made by another plan: {content['plan']}, now {asdict(self.plan)}")
        self.model.load_state_dict(content["model"])
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        curve = [CurvePoint(**row) for row in content["state"].pop("curve")]
        self.state = State(**content["state"], curve=curve)
        log.info("resumed at step %d of %s", self.state.step, self.state.total_steps)

    def autocast(self) -> torch.autocast:
        """Bfloat16 on a GPU; on a CPU, where it saves nothing at this size, fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def now(self) -> float:
        """Return the clock in seconds, with all device work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def update(self, loss_function: Callable[[PreTrainedModel, Tensor], Tensor]) -> Tensor:
        """Take one step; return its loss, a scalar left on the device."""
        factor = learning_rate_factor(self.state.step, self.state.total_steps)
        with self.autocast():
            loss = loss_function(self.model, self.batches(self.state.step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return loss.detach()

    def record(self, losses: list[Tensor]) -> None:
        """Measure the validation loss and add a row to the curve."""
        step, plan = self.state.step, self.plan
        with self.autocast():
            validation = mean_loss(self.model, self.validation, plan.shape.context)
        rate = plan.learning_rate * learning_rate_factor(step, self.state.total_steps)
        tokens = step * plan.batch_size * plan.shape.context
        point = CurvePoint(step, tokens, rate, torch.stack(losses).mean().item(), validation)
        self.state.curve.append(point)
        log.info("step %d: train %.4f, validation %.4f", step, point.train_loss, validation)

    def run(self, *, stop_after: int | None = None) -> None:
        """Train to the end, or to `stop_after` steps, as though interrupted there, with a checkpoint left behind."""
        state, plan = self.state, self.plan
        on_gpu = self.device.type == "cuda"
        loss_function = torch.compile(cross_entropy) if on_gpu else cross_entropy
        start, losses, timed_from = self.now() - state.seconds, [], 0.0
        with progress_bar() as bar:
            task = bar.add_task(f"train {plan.shape.arch}", total=state.total_steps, completed=state.step)
            while state.total_steps is None or state.step < state.total_steps:
                if state.total_steps is None and state.step == TIMED_STEPS.start:
                    timed_from = self.now()
                losses.append(self.update(loss_function))
                if state.total_steps is None and state.step == TIMED_STEPS.stop:
                    each = (self.now() - timed_from) / len(TIMED_STEPS)
                    left = 60 * (plan.minutes or 0) - (self.now() - start)
                    state.total_steps = state.step + max(1, int(left / each))
                    speed = plan.batch_size * plan.shape.context / each
                    log.info("%.1f ms a step, %.2f M tokens/s: %d steps", 1e3 * each, speed / 1e6, state.total_steps)
                bar.update(task, completed=state.step, total=state.total_steps)
                done = state.step == state.total_steps
                if state.step % plan.eval_every == 0 or done:
                    self.record(losses)
                    losses = []
                stopping = state.step == stop_after
                # The losses since the last row are in no checkpoint: save only where a row has just been written.
                if (state.step % plan.save_every == 0 and not losses) or done or stopping:
                    state.seconds = self.now() - start
                    self.save()
                if stopping:
                    return


# --------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """How to sample a text: `streams` independent passages of `windows` windows each, set one after another."""

    streams: int = 26
    windows: int = 9  # 26 x 9 windows of 256: 59,904 tokens
    max_rounds: int = 400


@dataclass(slots=True)
class Stream:
    """One passage in the making, and the rule by which it grows.

    A passage that follows another opens with a line break: its first token, which is no target of any loss, is given,
    and the rule below sees to it that the second half of the break is drawn next.
    """

    opening: int | None  # the given first token, or None where the passage opens the text
    ids: list[int] = field(default_factory=list)

    def accepts(self, tokenizer: Tokenizer, window: Sequence[int]) -> bool:
        """Tell whether the passage and this window come back from their text, token for token, in clean print."""
        ids = [*self.ids, *window]
        before = "" if self.opening is None else "A"  # any letter: what stands before a break does not change it
        text = before + tokenizer.decode(ids, skip_special_tokens=False)
        clean = all(c == "\n" or c.isprintable() for c in text) and "\ufffd" not in text and END_OF_TEXT not in text
        # A blank at the end could merge with what follows; a break at the end or a lone newline changes on joining.
        if not clean or text[-1].isspace() or join_lines(text) != text:
            return False
        return encode(tokenizer, text) == encode(tokenizer, before) + ids


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row at temperature 1 from the whole vocabulary; (B, V) -> (B,)."""
    return torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def draw_windows(model: PreTrainedModel, first: Tensor, context: int, generator: torch.Generator) -> Tensor:
    """Continue first tokens, shape (B,), to whole windows (B, context), each token drawn given its own window alone."""
    cache, tokens = DynamicCache(config=model.config), [first]
    for _ in range(context - 1):
        output = model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
        tokens.append(draw(output.logits[:, -1], generator))
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def draw_firsts(
    model: PreTrainedModel, streams: Sequence[Stream], breaks: list[int], context: int, generator: torch.Generator
) -> Tensor:
    """Draw the first token of each stream's next window: given the half context before it, for continuity.

    A stream without a window yet starts with its given token, or, at the head of a text, with one drawn after a break.
    """
    device = next(model.parameters()).device
    tails = [s.ids[-(context // 2) :] or breaks for s in streams]
    firsts = []
    for stream, tail in zip(streams, tails, strict=True):
        logits = model(input_ids=torch.tensor([tail], device=device), use_cache=False).logits[:, -1]
        drawn = draw(logits, generator)  # drawn even where it is given, so that every round takes as many numbers
        given = stream.opening is not None and not stream.ids
        firsts.append(torch.full_like(drawn, stream.opening) if given and stream.opening is not None else drawn)
    return torch.cat(firsts)


def sample_text(model: PreTrainedModel, tokenizer: Tokenizer, plan: SamplePlan, seed: int) -> tuple[str, int]:
    """Let the model write a text; return it and the number of windows drawn for it, those rejected included.

    In each round every unfinished stream draws one candidate for its next window; rejected ones are drawn anew.
    """
    context, device = model.config.max_position_embeddings, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    breaks = encode(tokenizer, f"A{BREAK}A")[1:-1]
    streams = [Stream(opening=None if i == 0 else breaks[0]) for i in range(plan.streams)]
    drawn = 0
    with progress_bar() as bar:
        task = bar.add_task(f"sample seed {seed}", total=plan.streams * plan.windows)
        for _ in range(plan.max_rounds):
            growing = [s for s in streams if len(s.ids) < plan.windows * context]
            if not growing:
                break
            firsts = draw_firsts(model, growing, breaks, context, generator)
            drawn += len(growing)
            for stream, window in zip(growing, draw_windows(model, firsts, context, generator).tolist(), strict=True):
                if stream.accepts(tokenizer, window):
                    stream.ids += window
                    bar.advance(task)
        else:
            raise RuntimeError(f"{plan.max_rounds} rounds gave no text: the model seldom writes text that round-trips")
    ids = [i for s in streams for i in s.ids]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if encode(tokenizer, join_lines(text)) != ids:
        raise RuntimeError(f"the text of seed {seed} does not come back from its own tokens: the passages' joins fail")
    return text, drawn


def check_texts(folder: Path, shingle: int = 64) -> None:
    """Check the stored texts as a reader sees them: whole windows, and no `shingle` tokens shared by two files."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = AutoConfig.from_pretrained(folder).max_position_embeddings
    seen: dict[tuple[int, ...], str] = {}
    for split in SPLITS:
        ids = tokenizer(read_text(folder / f"{split}.txt"), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) % context:
            raise RuntimeError(f"{split}.txt has {len(ids)} tokens, no multiple of {context}")
        for i in range(len(ids) - shingle + 1):
            owner = seen.setdefault(tuple(ids[i : i + shingle]), split)
            if owner != split:
                raise RuntimeError(f"{split}.txt and {owner}.txt share {shingle} tokens from token {i} on")


# ------------------------------------------------------------------------------------------------- facts and README


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def note(folder: Path, part: str, facts: dict[str, Any]) -> None:
    """Store one step's facts in provenance.json; those of the other steps stay."""
    path = folder / PROVENANCE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {part: facts})


def hardware(device: torch.device) -> str:
    """Name the device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def command_line() -> str:
    """Return this process's command line."""
    return shlex.join(["python", "tools/train_reference.py", *sys.argv[1:]])


def write_curve(folder: Path, curve: Sequence[CurvePoint]) -> None:
    """Write loss_curve.csv and its picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with (folder / "loss_curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CurvePoint.__dataclass_fields__)
        for p in curve:
            writer.writerow(
                [p.step, p.tokens, f"{p.learning_rate:.6g}", f"{p.train_loss:.5f}", f"{p.validation_loss:.5f}"]
            )
    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=100, layout="constrained")
    tokens = [p.tokens / 1e6 for p in curve]
    axes.plot(tokens, [p.train_loss for p in curve], label="training", linewidth=1)
    axes.plot(tokens, [p.validation_loss for p in curve], label="held-out novels", linewidth=1.5)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss_curve.png", metadata={"Software": None})
    plt.close(figure)


README = """\
# The reference model and its own texts

A causal language model in the style of {style}: {parameters:,} parameters, {layers} layers of width {width}, {heads} heads{kv_heads},
context {context}, a byte-level BPE of its own with {vocab_size:,} tokens ({end} is token 0), {head}.
The weights are stored in fp16 and are meant to be computed in fp32.

With it come three texts that **the model itself wrote**, at temperature 1, nothing cut from its distribution. On text drawn
from a model, the rise in loss after a change of the weights is, in expectation, the Kullback-Leibler divergence of the
changed model from the original one: the texts measure what a quantization did, and no third party's text is needed.

## How to read the texts
Split a file into lines, drop blank ones, join the rest with a blank line (`"\\n\\n"`), tokenise the whole once, and cut it
into windows of {context} tokens that do not overlap. This gives back exactly the sampled tokens, {sample_tokens:,} in each
file, and each window is a window as it was sampled: every token was drawn given only the earlier tokens of its own window.
The first token of a window, no target of any loss, was drawn given the {half} tokens before it; or it is the line break that
opens one of the {streams} passages in a file.

Windows that would not come back token for token, or hold unprintable characters, were drawn again: {accepted:.1%} of those
drawn were kept. So the texts come from the model's distribution on condition of that, and "in expectation" above holds up to
what the condition changes. The files share no 64 tokens in a row.

## Losses
Every token but a window's first is a target. Bits per byte = nats per token x tokens per byte / ln 2.

| text | tokens | nats/token | tokens/byte | bits/byte |
| --- | ---: | ---: | ---: | ---: |
{losses}

Measured with the stored fp16 weights in fp32 on a {evaluated_on}.

## How it was made
Trained on "100 English Novels" of the Computational Stylistics Group (public-domain novels; some held out), lines joined as
above. {steps:,} steps of {batch_size} windows: {tokens_seen:,} tokens seen, {passes:.1f} passes over the corpus's
{corpus_tokens:,} tokens. Muon for the matrices inside the blocks, AdamW for the rest; learning rate {learning_rate:g}, linear
warmup, linear decay to zero; weight decay {weight_decay:g}; bfloat16 autocast. More passes over a corpus of this size overfit;
the number of steps and the weight decay were chosen among a few by the loss on the held-out novels.
{minutes:.1f} minutes on one {trained_on}
(torch {torch}, transformers {transformers}).

    {train_command}
    {sample_command}
    {evaluate_command}

{given}Seeds: {train_seed} for the initial weights and the order of the data; {sample_seeds} for the calibration, validation
and test text. The texts were sampled on a {sampled_on} with torch {sample_torch}; elsewhere a rounding may turn a draw, and
the text from there on.

![Loss during training](loss_curve.png)

## Licence
Weights, tokenizer and texts are the project's own work and stand under its licence. The novels learned from are in the public
domain and are not part of this folder.

## Files
| file | bytes | SHA-256 |
| --- | ---: | --- |
{files}
"""  # noqa: E501


def render_readme(folder: Path) -> str:
    """Return README.md, made of provenance.json and the files that lie in the folder."""
    facts = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    training, sampling, evaluation = facts["training"], facts["sampling"], facts["evaluation"]
    shape, plan = training["plan"]["shape"], training["plan"]
    losses = {name: TextLoss(**row) for name, row in evaluation["losses"].items()}
    rows = [
        f"| {k} | {v.tokens:,} | {v.nats_per_token:.4f} | {v.tokens_per_byte:.4f} | {v.bits_per_byte:.4f} |"
        for k, v in losses.items()
    ]
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "README.md" and p.name[0] != "."]
    llama = shape["arch"] == "llama"
    asked = plan["minutes"]
    return README.format(
        style="Llama" if llama else "GPT-2",
        kv_heads=f" ({shape['kv_heads']} for keys and values)" if llama else "",
        head="a head of its own" if llama else "a tied head",
        given=f"The {asked:g} minutes came to {training['steps']:,} steps: `--steps` repeats them. " if asked else "",
        **{k: shape[k] for k in ("layers", "width", "heads", "context")},
        **{k: plan[k] for k in ("batch_size", "learning_rate", "weight_decay", "vocab_size")},
        **{k: training[k] for k in ("parameters", "steps", "tokens_seen", "corpus_tokens", "torch", "transformers")},
        end=END_OF_TEXT,
        half=shape["context"] // 2,
        passes=training["tokens_seen"] / training["corpus_tokens"],
        minutes=training["seconds"] / 60,
        trained_on=training["hardware"],
        train_command=training["command"],
        train_seed=plan["seed"],
        sample_tokens=sampling["tokens"],
        streams=sampling["streams"],
        sample_command=sampling["command"],
        sample_seeds=", ".join(str(s) for s in sampling["seeds"].values()),
        sample_torch=sampling["torch"],
        sampled_on=sampling["hardware"],
        accepted=sampling["windows_kept"] / sampling["windows_drawn"],
        evaluated_on=evaluation["hardware"],
        evaluate_command=evaluation["command"],
        losses="\n".join(rows),
        files="\n".join(f"| `{p.name}` | {p.stat().st_size:,} | `{sha256(p)}` |" for p in files),
    )


def write_readme(folder: Path) -> None:
    """Write README.md anew; nothing is measured."""
    (folder / "README.md").write_text(render_readme(folder), encoding="utf-8", newline="\n")


# ------------------------------------------------------------------------------------------------------ subcommands


def progress_bar() -> Progress:
    """Return a progress bar, quiet where the output is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def pick_device(name: str) -> torch.device:
    """Return the device named, "auto" being a GPU where there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def train_reference(
    plan: Plan,
    *,
    corpus: Path,
    validation: Path,
    out: Path,
    device: torch.device,
    checkpoint: Path | None = None,
    tokenizer_from: Path | None = None,
    stop_after: int | None = None,
) -> None:
    """Train a model and write it, with its tokenizer and its loss curve, into `out`.

    Arguments:
        plan: what to train, and for how long.
        corpus: training text; validation: held-out text, for the curve only.
        out: folder to write into.
        device: where to train.
        checkpoint: folder that lets a killed run go on; the same plan must be given again.
        tokenizer_from: folder with a tokenizer.json to use, instead of training one.
        stop_after: leave off at this step, as though killed, with a checkpoint but without a model.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = read_text(corpus)
    # A resumed run finds its tokenizer where it left it; training it again would give the same one, but costs a minute.
    known = (tokenizer_from or checkpoint or out) / TOKENIZER
    use_known = tokenizer_from is not None or (checkpoint is not None and known.exists())
    tokenizer = Tokenizer.from_file(str(known)) if use_known else train_tokenizer(text, plan.vocab_size)
    if checkpoint is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(checkpoint / TOKENIZER))
    save_tokenizer(tokenizer, out, plan.shape.context)
    ids = encode_corpus(tokenizer, text).to(device)
    held_out = torch.tensor(encode(tokenizer, read_text(validation)), device=device)
    log.info("%s training tokens, %s held out", f"{len(ids):,}", f"{len(held_out):,}")

    model = build_model(plan.shape, tokenizer.get_vocab_size(), plan.seed).to(device)
    batches = Batches(ids, context=plan.shape.context, batch_size=plan.batch_size, seed=plan.seed)
    trainer = Trainer(plan, model, batches, held_out, checkpoint)
    trainer.resume()
    trainer.run(stop_after=stop_after)
    if trainer.state.step != trainer.state.total_steps:
        log.info("stopped at step %d", trainer.state.step)
        return
    save_model(model, out)
    write_curve(out, trainer.state.curve)
    note(out, "training", training_facts(trainer, corpus, validation))


def training_facts(trainer: Trainer, corpus: Path, validation: Path) -> dict[str, Any]:
    """Return what README.md tells of a finished training run."""
    import transformers

    plan, state = trainer.plan, trainer.state
    return {
        "command": command_line(),
        "plan": asdict(plan),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),  # a tied head counts once
        "steps": state.step,
        "tokens_seen": state.step * plan.batch_size * plan.shape.context,
        "corpus_tokens": len(trainer.batches.ids),
        "corpus_sha256": sha256(corpus),
        "validation_sha256": sha256(validation),
        "seconds": round(state.seconds, 1),
        "hardware": hardware(trainer.device),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def sample_reference(folder: Path, plan: SamplePlan, *, seed: int, device: torch.device) -> None:
    """Write the three texts beside a stored model; the seeds are `seed` and the two that follow it."""
    model = load_model(folder, device)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    seeds = {split: seed + i for i, split in enumerate(SPLITS)}
    drawn = 0
    for split in SPLITS:
        text, windows = sample_text(model, tokenizer, plan, seeds[split])
        (folder / f"{split}.txt").write_text(text + "\n", encoding="utf-8", newline="\n")
        drawn += windows
        log.info("%s.txt: %d windows kept of %d drawn", split, plan.streams * plan.windows, windows)
    check_texts(folder)
    facts = {
        "command": command_line(),
        "seeds": seeds,
        **asdict(plan),
        "tokens": plan.streams * plan.windows * model.config.max_position_embeddings,
        "windows_kept": plan.streams * plan.windows * len(SPLITS),
        "windows_drawn": drawn,
        "hardware": hardware(device),
        "torch": torch.__version__.split("+")[0],
    }
    note(folder, "sampling", facts)


def evaluate_reference(folder: Path, texts: dict[str, Path], *, device: torch.device) -> dict[str, TextLoss]:
    """Measure a stored model on texts given by name and on its own, and write README.md."""
    model = load_model(folder, device)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    own = {f"its own: {split}": folder / f"{split}.txt" for split in SPLITS}
    losses = {name: measure(model, tokenizer, path, device) for name, path in (texts | own).items()}
    for name, loss in losses.items():
        log.info("%s: %.4f nats/token, %.4f bits/byte", name, loss.nats_per_token, loss.bits_per_byte)
    rows = {name: asdict(loss) for name, loss in losses.items()}
    note(folder, "evaluation", {"command": command_line(), "hardware": hardware(device), "losses": rows})
    write_readme(folder)
    return losses


PLAN, SHAPE, SAMPLES = Plan(steps=3300), Shape(), SamplePlan()  # the defaults below
InputFile = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
ModelFolder = Annotated[Path, typer.Option("--model", exists=True, file_okay=False, help="Folder that `train` wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def train(
    corpus: InputFile,
    validation: InputFile,
    out: Annotated[Path, typer.Option()],
    arch: Annotated[Arch, typer.Option()] = "gpt2",
    steps: Annotated[
        int | None, typer.Option(help="Training steps (3300 made the stored model); or --minutes.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for about so long; or give --steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = PLAN.batch_size,
    learning_rate: Annotated[float, typer.Option()] = PLAN.learning_rate,
    weight_decay: Annotated[float, typer.Option()] = PLAN.weight_decay,
    seed: Annotated[int, typer.Option()] = PLAN.seed,
    vocab_size: Annotated[int, typer.Option()] = PLAN.vocab_size,
    heads: Annotated[int | None, typer.Option(help="Attention heads; 4, or 8 for the Llama style.")] = None,
    layers: Annotated[int, typer.Option()] = SHAPE.layers,
    device: Device = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder that lets a killed run go on.")] = None,
    tokenizer_from: Annotated[Path | None, typer.Option(help="Folder with a tokenizer.json to use.")] = None,
) -> None:
    """Train a tokenizer and a model on a .txt or .txt.xz corpus."""
    shape = Shape(arch=arch, layers=layers, heads=heads or (8 if arch == "llama" else 4))
    plan = Plan(
        shape=shape, steps=steps, minutes=minutes, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, seed=seed, vocab_size=vocab_size,
    )  # fmt: skip
    train_reference(
        plan, corpus=corpus, validation=validation, out=out, device=pick_device(device), checkpoint=checkpoint,
        tokenizer_from=tokenizer_from,
    )  # fmt: skip


@app.command()
def sample(
    model: ModelFolder,
    seed: Annotated[int, typer.Option(help="Seed of calibration.txt; the other texts take the two after it.")] = 1001,
    streams: Annotated[int, typer.Option(help="Passages in a text.")] = SAMPLES.streams,
    windows: Annotated[int, typer.Option(help="Windows in a passage.")] = SAMPLES.windows,
    device: Device = "auto",
) -> None:
    """Let a trained model write calibration.txt, validation.txt and test.txt."""
    sample_reference(model, SamplePlan(streams, windows), seed=seed, device=pick_device(device))


@app.command()
def evaluate(
    model: ModelFolder,
    validation: InputFile,
    wikitext: Annotated[Path | None, typer.Option(exists=True, help="WikiText-2's raw test split.")] = None,
    device: Device = "auto",
) -> None:
    """Measure a trained model on held-out texts and on its own, and write README.md."""
    texts = {"held-out novels": validation} | ({"WikiText-2 test": wikitext} if wikitext else {})
    evaluate_reference(model, texts, device=pick_device(device))


@app.command()
def readme(model: ModelFolder) -> None:
    """Write README.md anew from what the other commands noted; nothing is measured."""
    write_readme(model)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    app()
