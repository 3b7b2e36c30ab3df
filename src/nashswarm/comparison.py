"""The market against the field: for each baseline the best market of no more bytes, and the interval between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nashswarm.intervals import Blocks, Interval, draw

FIELD = ("rtn", "gptq")  # how the names of the field's methods begin
CODECS = ("market-coded", "market-tiles")
Documents = Mapping[str, Mapping[str, Any]]  # method -> its metrics


@dataclass(frozen=True, slots=True)
class Match:
    """A baseline beside the best market of one codec whose file is no larger; None where no file is that small."""

    baseline: str
    codec: str
    market: str | None = None
    ratio: float | None = None  # the market's rise over the baseline's; None where either is not above 0
    interval: Interval | None = None  # of the market's rise minus the baseline's; None where metrics hold no blocks


def matches(documents: Documents, corpus: str, resamples: int, seed: int) -> list[Match]:
    """Every method of the field against every codec of the market that was run, in the methods' order.

    Best is the least rise in loss on `corpus`; among equals, the smaller file. Arguments: `resamples` and `seed`, those
    of the evaluation, so that intervals are drawn as its own are.
    """
    found = []
    for baseline in (m for m in documents if m.startswith(FIELD)):
        for codec in CODECS:
            markets = [m for m in documents if m.startswith(codec)]
            fitting = [m for m in markets if _bytes(documents[m]) <= _bytes(documents[baseline])]
            if fitting:
                best = min(fitting, key=lambda m: (_rise(documents[m], corpus), _bytes(documents[m]), m))
                found.append(_match(documents, corpus, baseline, codec, best, resamples, seed))
            elif markets:
                found.append(Match(baseline, codec))
    return found


@dataclass(frozen=True, slots=True)
class Rival:
    """Another tool's model beside ours: the best of ours whose file is no larger; None where none is that small."""

    peer: str
    bits: float  # of the peer
    ours: str | None = None
    interval: Interval | None = None  # of our rise minus the peer's

    @property
    def verdict(self) -> str:
        """Whether our loss rises less, more, or the run cannot tell."""
        if self.ours is None:
            return "none is that small"
        if self.interval is None or not self.interval.resolved:
            return "not resolved"
        return "below" if self.interval.difference < 0 else "above" if self.interval.difference > 0 else "equal"


def rivals(ours: Documents, peers: Documents, corpus: str, resamples: int, seed: int) -> list[Rival]:
    """Every peer, by falling true size, beside the one of ours with the least rise among the files that are no larger.

    Arguments as those of `matches`; `ours` and `peers` must have been measured on the same original and tokens.
    """
    found = []
    for name, document in sorted(peers.items(), key=lambda item: (-_bytes(item[1]), item[0])):
        fitting = [m for m in ours if _bytes(ours[m]) <= _bytes(document)]
        bits = float(document["size"]["bits_per_weight"])
        if not fitting:
            found.append(Rival(name, bits))
            continue
        best = min(fitting, key=lambda m: (_rise(ours[m], corpus), _bytes(ours[m]), m))
        pair = ours[best]["quality"][corpus], document["quality"][corpus]
        found.append(Rival(name, bits, best, between(*pair, resamples, seed)))
    return found


def _match(
    documents: Documents, corpus: str, baseline: str, codec: str, market: str, resamples: int, seed: int
) -> Match:
    ours, theirs = (_rise(documents[m], corpus) for m in (market, baseline))
    ratio = ours / theirs if ours > 0 and theirs > 0 else None
    mine, other = (documents[m]["quality"][corpus] for m in (market, baseline))
    return Match(baseline, codec, market, ratio, between(mine, other, resamples, seed))


def between(ours: Mapping[str, Any], theirs: Mapping[str, Any], resamples: int, seed: int) -> Interval | None:
    """The paired interval of our rise minus theirs, nats per token, from two `quality.<corpus>` blocks of metrics.

    None where either holds no `window_blocks`, or where the two were not measured on the same tokens.
    """
    mine, other = ours.get("window_blocks"), theirs.get("window_blocks")
    if not mine or not other or mine["targets"] != other["targets"]:
        return None
    rises = np.array(mine["rises"], np.float64) - np.array(other["rises"], np.float64)
    return draw(Blocks(rises, np.array(mine["targets"], np.int64)), resamples, seed)


def _bytes(document: Mapping[str, Any]) -> int:
    return int(document["size"]["file_bytes"])


def _rise(document: Mapping[str, Any], corpus: str) -> float:
    return float(document["quality"][corpus]["delta_loss"])
