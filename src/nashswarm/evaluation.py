"""How much worse a model became: both protocols' losses, KL divergence, agreement, and paired intervals.

Standard protocol: non-overlapping windows of the joined split; every token but a window's first is a target; losses are
summed over all targets, not averaged over windows. Paper's protocol: single texts of 64 tokens, padded with EOS, pads
scored too, the mean over texts of the per-text mean.

The original model is run once; of its outputs only the hidden states before the head are kept, 30 to 100 times smaller
than logits, from which the head makes the logits again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nashswarm.blocks import outputs_by_block
from nashswarm.config import Evaluation, PaperProtocol
from nashswarm.console import quiet
from nashswarm.devices import resolve, wide
from nashswarm.engine import LOCAL, Engine
from nashswarm.intervals import Blocks, Interval, blocks, bootstrap, draw, rounded, student, tokens_needed
from nashswarm.models import Checkpoint, padding_token
from nashswarm.types import InputError, ModelIndex, Progress, TokenizedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KL_QUANTILES = {"median": 0.5, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the original model says on one corpus."""

    hidden: np.ndarray  # float32 [tokens, width], before the head
    paper_losses: np.ndarray  # float64 [texts], nats


@dataclass(frozen=True, slots=True)
class Losses:
    """What a model says on one corpus, beside the original. Losses in nats."""

    window_losses: np.ndarray  # float64 [windows], summed over the window's targets
    window_targets: np.ndarray  # int64 [windows]
    original_window_losses: np.ndarray  # float64 [windows]
    kl: np.ndarray  # float32 [targets], KL(original || model) in nats
    agreement: float  # share of targets at which both find the same token most likely
    paper_losses: np.ndarray  # float64 [texts]
    original_paper_losses: np.ndarray  # float64 [texts]


# --- windows and texts ---------------------------------------------------------------------------------------------


def windows(ids: np.ndarray, context: int) -> list[np.ndarray]:
    """Non-overlapping windows of `context` tokens, the last one shorter (kept if it has a target)."""
    cut = [ids[i : i + context] for i in range(0, ids.size, context)]
    return [w for w in cut if w.size > 1]


def paper_texts(split: TokenizedSplit, protocol: PaperProtocol, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's inputs: ids and attention mask, int64 [texts, length].

    The first max(protocol.texts) texts longer than `longer_than` characters, or with `all_texts` every one, cut to
    `length` tokens or padded with `pad` (EOS) on the right. All positions are labels, pads included; the mask keeps
    pads from being attended to, as the tokenizer's own padding does.
    """
    most = None if protocol.all_texts else max(protocol.texts)
    chosen = np.flatnonzero(split.text_lengths > protocol.longer_than)[:most]
    if not chosen.size:
        raise InputError(f"no text is longer than {protocol.longer_than} characters; the paper's protocol needs one")
    ids = np.full((chosen.size, protocol.length), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, index in enumerate(chosen):
        text = split.text(int(index))[: protocol.length]
        ids[row, : text.size], mask[row, : text.size] = text, 1
    return ids, mask


# --- running a model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """A model and what it is to read, in batches: windows of the standard protocol, then the paper's texts."""

    model: PreTrainedModel
    batches: list[dict[str, Tensor]]  # the model's arguments, int64 [windows or texts, tokens]
    count: int  # of the batches, those of windows
    original: Original | None

    @classmethod
    def open(
        cls,
        load: Callable[[], PreTrainedModel],
        split: TokenizedSplit,
        settings: Evaluation,
        context: int,
        original: Callable[[], Original] | None = None,
    ) -> _Reader:
        model, in_windows = load(), _window_batches(split.ids, context, settings.batch_tokens)
        texts = paper_texts(split, settings.paper, padding_token(model.config))
        size = max(1, settings.batch_tokens // settings.paper.length)
        in_texts = [
            {"input_ids": ids, "attention_mask": mask}
            for ids, mask in zip(*(torch.split(torch.from_numpy(rows), size) for rows in texts), strict=True)
        ]
        return cls(model, in_windows + in_texts, len(in_windows), original() if original else None)

    def read(self, own: slice, progress: Progress) -> _Read:
        """Some of the batches, one block of the model at a time."""
        batches = self.batches[own]
        states = outputs_by_block(self.model, batches, progress)
        count = min(max(self.count - own.start, 0), len(batches))
        head = self.model.get_output_embeddings()
        with torch.inference_mode():
            losses = [
                _text_loss(head(hidden), ids)
                for batch, given in zip(states[count:], batches[count:], strict=True)
                for hidden, ids in zip(batch, given["input_ids"], strict=True)
            ]
        windows = [ids for given in batches[:count] for ids in given["input_ids"]]
        start = sum(given["input_ids"].numel() for given in self.batches[: min(own.start, self.count)])
        return _Read(windows, [window for batch in states[:count] for window in batch], start, losses)


@dataclass(frozen=True, slots=True)
class _Read:
    windows: list[Tensor]  # int64 [tokens]
    states: list[Tensor]  # before the head, float32 [tokens, width]
    start: int  # tokens of the windows before these
    text_losses: list[float]  # nats, by the paper's protocol, mean over a text


@dataclass(frozen=True, slots=True)
class Original:
    """What a model is compared with."""

    head: Callable[[Tensor], Tensor]  # hidden states [n, width] -> logits [n, vocabulary]
    baseline: Baseline


def open_original(
    directory: Path, index: ModelIndex, baseline: Callable[[], Baseline], device: str = "cpu"
) -> Original:
    """The original model's last step, from its checkpoint, and what it says."""
    return Original(original_head(directory, index, device), baseline())


def original_head(directory: Path, index: ModelIndex, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """Hidden states [n, width] -> logits [n, vocabulary]."""
    weight = Checkpoint.open(directory, index).read(index.head).to(resolve(device), copy=True)
    return lambda hidden: functional.linear(hidden, weight)


def original_outputs(
    load: Callable[[], PreTrainedModel],
    split: TokenizedSplit,
    settings: Evaluation,
    context: int,
    progress: Progress,
    engine: Engine = LOCAL,
) -> Baseline:
    """Run the original model once. Arguments: `load` makes it, on each worker; `context`, tokens per window."""
    shared = engine.share(partial(_Reader.open, load, split, settings, context), True)
    parts = list(_spread(_said, shared, engine, progress))
    return Baseline(np.concatenate([hidden for hidden, _ in parts]), np.concatenate([texts for _, texts in parts]))


def _said(reader: _Reader, own: slice, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    read, width = reader.read(own, progress), reader.model.get_output_embeddings().weight.shape[1]
    return torch.cat([torch.empty(0, width), *(s.cpu() for s in read.states)]).numpy(), np.array(read.text_losses)


def measure(
    load: Callable[[], PreTrainedModel],
    original: Callable[[], Original],
    split: TokenizedSplit,
    settings: Evaluation,
    context: int,
    progress: Progress,
    engine: Engine = LOCAL,
) -> Losses:
    """Run a model and compare. Arguments: `load` and `original` make the two on each worker; else as above."""
    shared = engine.share(partial(_Reader.open, load, split, settings, context, original), True)
    parts = list(_spread(_compared, shared, engine, progress))
    rows = [row for part in parts for row in part.rows]
    losses, original_losses, counts = (np.array(column) for column in zip(*rows, strict=True))
    return Losses(
        window_losses=losses,
        window_targets=counts.astype(np.int64),
        original_window_losses=original_losses,
        kl=np.concatenate([kl for part in parts for kl in part.kls]),
        agreement=sum(part.agreed for part in parts) / int(counts.sum()),
        paper_losses=np.array([loss for part in parts for loss in part.text_losses]),
        original_paper_losses=parts[0].original_text_losses,
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    rows: list[tuple[float, float, int]]  # of each window: its loss, the original's, targets
    kls: list[np.ndarray]
    agreed: int
    text_losses: list[float]
    original_text_losses: np.ndarray


def _compared(reader: _Reader, own: slice, progress: Progress) -> _Compared:
    assert reader.original is not None
    read, own_head = reader.read(own, progress), reader.model.get_output_embeddings()
    head, baseline = reader.original.head, reader.original.baseline
    rows, kls, agreed, start = [], [], 0, read.start
    for window, said in zip(progress(read.windows, "windows"), read.states, strict=True):
        # Copied to memory that torch aligns: a product of few rows rounds otherwise by the alignment of its operands.
        original = torch.from_numpy(baseline.hidden[start : start + len(window)]).to(said.device, copy=True)
        start += len(window)
        with torch.inference_mode():
            hidden = said.clone()
            loss, kl, same, original_loss = _compare(
                own_head(hidden[:-1]), head(original[:-1]), window[1:].to(said.device)
            )
        rows.append((loss, original_loss, len(window) - 1))
        kls.append(kl)
        agreed += same
    return _Compared(rows, kls, agreed, read.text_losses, baseline.paper_losses)


def _spread(function: Callable[..., Any], shared: Any, engine: Engine, progress: Progress) -> Iterator[Any]:
    """A share of the text for each worker; one worker shows how far it is itself."""
    (tokens,) = engine.map(_tokens, shared, [()])
    shares = even_shares(tokens, engine.slots)
    if len(shares) == 1:
        return engine.map(function, shared, [(shares[0], progress)])
    found = engine.map(function, shared, ((own, quiet) for own in shares))
    return (part for _, part in zip(progress(shares, "shares of the text"), found, strict=True))


def _tokens(reader: _Reader) -> list[int]:
    """Of each batch."""
    return [batch["input_ids"].numel() for batch in reader.batches]


def even_shares(sizes: Sequence[int], count: int) -> list[slice]:
    """At most `count` runs of items, next to each other, whose sizes add up to much the same: none is empty."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    edges = np.searchsorted(middles, np.arange(count + 1) * sum(sizes) / count).tolist()
    return [slice(first, last) for first, last in pairwise(edges) if first < last]


def _window_batches(ids: np.ndarray, context: int, batch_tokens: int) -> list[dict[str, Tensor]]:
    """Inputs of the model; the last window, where it is shorter, by itself."""
    cut = windows(ids, context)
    batch = max(1, batch_tokens // context)
    full = len(cut) - (len(cut[-1]) < context)
    groups = [cut[i : min(i + batch, full)] for i in range(0, full, batch)] + [[w] for w in cut[full:]]
    return [{"input_ids": torch.from_numpy(np.stack(group).astype(np.int64))} for group in groups]


def _text_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean over all positions but the first: float32 [length, vocabulary], int64 [length] -> nats."""
    place = wide(logits.device)
    return functional.cross_entropy(logits[:-1].to(place).double(), ids[1:].to(place)).item()


def _compare(logits: Tensor, original: Tensor, targets: Tensor) -> tuple[float, np.ndarray, int, float]:
    """Summed loss, KL [targets], equal arg maxima, the original's summed loss; logits float32 [targets, vocabulary]."""
    log_q, log_p = logits.float().log_softmax(-1), original.float().log_softmax(-1)
    same = int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
    found = (lp.gather(-1, targets[:, None]).to(wide(lp.device)).double() for lp in (log_q, log_p))
    loss, original_loss = (-values.sum().item() for values in found)
    kl = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1)  # in place: new memory costs more than the arithmetic
    return loss, kl.cpu().numpy(), same, original_loss


# --- figures -------------------------------------------------------------------------------------------------------


def window_blocks(losses: Losses, settings: Evaluation) -> Blocks:
    """Rises and targets summed over blocks of `settings.block` windows: windows of one text are not independent."""
    return blocks(losses.window_losses - losses.original_window_losses, losses.window_targets, settings.block)


def paired_interval(losses: Losses, settings: Evaluation) -> Interval:
    """The rise in loss per token and its 95 % interval, by a block bootstrap over contiguous windows.

    Blocks are drawn at least `settings.resamples` times; each draw's rise is the ratio of its summed differences to
    its targets.
    """
    return draw(window_blocks(losses, settings), settings.resamples, settings.seed)


def quality_figures(losses: Losses, settings: Evaluation) -> dict[str, Any]:
    """The `quality.<corpus>` block of the metrics; `window_blocks` gives intervals between any two methods.

    `tokens_to_resolve`: how many targets it takes to tell this rise from none, judged by its spread over blocks.
    """
    tokens = int(losses.window_targets.sum())
    loss, original = losses.window_losses.sum() / tokens, losses.original_window_losses.sum() / tokens
    kl = losses.kl.astype(np.float64)
    interval, summed = paired_interval(losses, settings), window_blocks(losses, settings)
    reckoned, needed = student(summed), tokens_needed(summed, interval.difference)
    return {
        "loss": rounded(loss),
        "perplexity": rounded(np.exp(loss)),
        "tokens": tokens,
        "delta_loss": rounded(interval.difference),
        "delta_loss_ci95": [rounded(interval.low), rounded(interval.high)],
        "delta_loss_t95": [rounded(reckoned.low), rounded(reckoned.high)],
        "delta_loss_percent": rounded(100 * interval.difference / original),
        "resolved": interval.resolved,
        "tokens_to_resolve": math.ceil(needed) if math.isfinite(needed) else None,
        "kl_mean": rounded(losses.kl.mean(dtype=np.float64)),
        **{f"kl_{name}": rounded(np.quantile(kl, q)) for name, q in KL_QUANTILES.items()},
        "top1_agreement": rounded(losses.agreement),
        "window_blocks": {"rises": list(map(rounded, summed.rises)), "targets": summed.targets.tolist()},
    }


def paper_figures(losses: Losses, settings: Evaluation) -> dict[str, Any]:
    """The `paper.<corpus>` block of the metrics: the first sample count, and all of them under `by_count`."""
    protocol, texts = settings.paper, losses.paper_losses.size
    counts = [n for n in protocol.texts if n <= texts] + [texts] * protocol.all_texts
    by_count = {str(n): _paper_row(losses, n, settings) for n in counts}
    first = min(protocol.texts[0], texts)
    return {**_paper_row(losses, first, settings), "by_count": by_count}


def _paper_row(losses: Losses, count: int, settings: Evaluation) -> dict[str, Any]:
    """Its interval is over texts, paired, of the mean difference alone: the original's loss stands for itself."""
    loss, original = losses.paper_losses[:count].mean(), losses.original_paper_losses[:count].mean()
    differences = losses.paper_losses[:count] - losses.original_paper_losses[:count]
    interval = bootstrap(differences, np.ones(count, np.int64), 1, settings.resamples, settings.seed)
    return {
        "loss": rounded(loss),
        "perplexity": rounded(np.exp(loss)),
        "delta_loss_percent": rounded(100 * (loss - original) / original),
        "delta_loss_percent_ci95": [rounded(100 * bound / original) for bound in (interval.low, interval.high)],
        "resolved": interval.resolved,
        "texts": count,
    }
