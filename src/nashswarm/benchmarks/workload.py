"""What every call of the pipeline computes and moves, as formulas in a model's shape; GPT-2's make, 12 width^2 a block.

Counts are of `costs`; bytes are those of arguments and results, and equal what was recorded (tests/test_scale.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nashswarm import entropy, rans
from nashswarm.benchmarks.costs import Counts
from nashswarm.regression import JUDGED, lower_size
from nashswarm.statistics import cuts
from nashswarm.streams import pass_tokens

CONTEXT = 1024
BATCH = 2048  # tokens of a pass of score and evaluate
PREFIX = {"market-tiles-3_25": 16384, "market-coded-3_0": 32768}  # tokens of calibration; params.yaml's
CHAINED = tuple(PREFIX)
FIRST, WRITERS = "attn.c_attn", ("attn.c_proj", "mlp.c_proj")
INSIDE = (FIRST, "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # in the order in which they run
TABLES = ("wte", "wpe")
HISTOGRAM = 8 * entropy.TABLES * rans.SYMBOLS  # bytes, of what a matrix' codes are counted by


def tokens_of(stage: str, method: str) -> int:
    """Of a batch."""
    return pass_tokens(PREFIX[method]) if stage == "pack" and method in PREFIX else BATCH


@dataclass(frozen=True, slots=True)
class Text:
    """Number of batches. The defaults are params.yaml's, and WikiText-2's test text in GPT-2's tokens."""

    score: int = 16  # scoring.tokens over BATCH
    prefix: Mapping[str, int] = field(default_factory=lambda: {m: t // tokens_of("pack", m) for m, t in PREFIX.items()})
    evaluate: int = -(-283_000 // BATCH)


@dataclass(frozen=True, slots=True)
class Model:
    """Of GPT-2's make."""

    layers: int
    width: int
    vocabulary: int = 50257

    @property
    def block(self) -> int:
        """Weights of a block."""
        return 12 * self.width**2

    @property
    def outside(self) -> int:
        """Weights of the tables; the head is one of them."""
        return (self.vocabulary + CONTEXT) * self.width

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.block + self.outside

    def shape(self, role: str) -> tuple[int, int]:
        """[out, in] of a matrix."""
        d = self.width
        return {
            "wte": (self.vocabulary, d),
            "wpe": (CONTEXT, d),
            "attn.c_attn": (3 * d, d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (4 * d, d),
            "mlp.c_proj": (d, 4 * d),
        }[role]


@dataclass(frozen=True, slots=True)
class At:
    """A call's place: the model, the matrix, tokens of its batch, and whether its block is the model's first."""

    model: Model
    role: str = ""
    tokens: int = BATCH
    first: bool = False

    @property
    def out(self) -> int:
        """Rows of the matrix."""
        return self.model.shape(self.role)[0]

    @property
    def into(self) -> int:
        """Columns of the matrix."""
        return self.model.shape(self.role)[1]

    @property
    def inside(self) -> bool:
        """Whether the matrix is one of a block."""
        return self.role in INSIDE


def forward(model: Model, tokens: int) -> float:
    """Operations of a block's forward pass."""
    return 24.0 * tokens * model.width**2 + attention(model, tokens)


def attention(model: Model, tokens: int) -> float:
    """Of which those between tokens."""
    return 4.0 * tokens * CONTEXT * model.width


MOMENTS = 46  # width^2 of a block: squares of inputs and outputs of its matrices
STREAMS = 16  # widths of a block: its matrices' inputs and outputs


def _embedded(at: At) -> Counts:
    return Counts(bytes=4.0 * at.tokens * at.model.width)


def _forward(at: At) -> Counts:
    m = at.model
    return Counts(forward(m, at.tokens), bytes=4.0 * (at.tokens * STREAMS * m.width + m.block))


def _head(at: At) -> Counts:
    m = at.model
    return Counts(4.0 * at.tokens * m.vocabulary * m.width, bytes=4.0 * at.tokens * m.vocabulary)


def _block(at: At) -> Counts:
    d, products = at.model.width, 2 * forward(at.model, at.tokens) + 2.0 * at.tokens * MOMENTS * at.model.width**2
    return Counts(products, bytes=4.0 * (MOMENTS * d**2 + at.tokens * STREAMS * d))


def _factors(at: At, output: bool = True) -> float:
    """Operations of the factors of both moments, float64."""
    sides = [at.into, *([at.out] if output and at.inside else [])]
    return sum(2 * n**3 / 3 for n in sides)


def _offer(at: At) -> Counts:
    """Factors are inverted, which takes as long: what errors cost without damping follows from it."""
    return Counts(2 * _factors(at), weights=at.out * at.into)


def _round(at: At) -> Counts:
    """With feedback to later columns, and from row to row where rows interact."""
    products = _factors(at) + at.out * at.into**2
    return Counts(products, at.into * at.out**2 * float(at.inside), at.out * at.into)


def _round_columns(at: At) -> Counts:
    """GPTQ: inside blocks alone, and rows do not interact."""
    products = _factors(at, output=False) + at.out * at.into**2 if at.inside else 0.0
    return Counts(products, weights=at.out * at.into, bytes=4.0 * at.into**2)


def _nearest(at: At) -> Counts:
    """The inputs' moment is read, for its diagonal."""
    return Counts(weights=at.out * at.into, bytes=4.0 * at.into**2)


def _enter(at: At) -> Counts:
    """Both streams are brought to a block."""
    passes = 1 if at.first else 2
    return Counts(passes * forward(at.model, at.tokens), bytes=passes * 4.0 * at.tokens * STREAMS * at.model.width)


def _compare(at: At) -> Counts:
    """The block is run up to the matrix; settled matrices multiply once, behind their settling."""
    d, t = at.model.width, at.tokens
    place = INSIDE.index(at.role)
    reach = attention(at.model, t) * (place > 0)
    if place:
        out, into = at.model.shape(INSIDE[place - 1])
        reach += 2.0 * t * out * into
    writer = at.role in WRITERS
    own = 2.0 * t * lower_size(at.into) + (4.0 * t * at.into * at.out if writer else 2.0 * t * at.into**2)
    return Counts(reach + own, bytes=4.0 * t * (STREAMS * d * (place > 0) + 4 * at.into))


def _correct(at: At) -> Counts:
    """Nine regressions, eight of them, of few outputs and in float32, held against the other fold."""
    judged = 8 * (at.into**3 / 3 + 6 * min(at.out, JUDGED) * at.into**2)
    last = at.into**3 / 3 + (2 + 2 * (at.role not in WRITERS)) * at.into**2 * at.out
    return Counts(judged + 2 * last, weights=at.out * at.into, bytes=100.0 * at.into**2)


def _weights(at: At) -> Counts:
    return Counts(weights=at.out * at.into)


def _all_weights(at: At) -> Counts:
    return Counts(weights=at.model.weights)


def _model(at: At) -> Counts:
    """What stands outside of blocks is read, or decoded."""
    return Counts(weights=at.model.outside)


def _decode(at: At) -> Counts:
    return Counts(weights=at.model.layers * at.model.block)


def _batch(at: At) -> Counts:
    """Behind decoding: blocks, two heads."""
    m = at.model
    products = m.layers * forward(m, at.tokens) + 4.0 * at.tokens * m.vocabulary * m.width
    return Counts(products, bytes=4.0 * at.tokens * m.vocabulary)


ROUND = {"rtn4-g64": _nearest, "gptq4-g128": _round_columns, "market-tiles-3_25": _round, "market-coded-3_0": _round}
OFFERED = {"market-tiles-3_25": 8 * 17 / (16 * 64)}  # bytes a weight: sizes, damages and weights of every tile

# (stage, label, whose seconds) -> counts. `_encode` goes by method, see ROUND.
COUNTS: Mapping[tuple[str, str, str], Callable[[At], Counts]] = {
    ("score", "start", "seconds"): _model,
    ("score", "_embedded", "seconds"): _embedded,
    ("score", "_forward", "seconds"): _forward,
    ("score", "_forward", "after"): lambda at: Counts(bytes=returned("_forward", at)),
    ("score", "_head", "seconds"): _head,
    ("score", "_block", "seconds"): _block,
    ("score", "_block", "before"): lambda at: Counts(bytes=sent("_block", at)),
    ("score", "_block", "after"): lambda at: Counts(bytes=returned("_block", at)),
    ("score", "_block", "gap"): lambda at: Counts(bytes=sum(parts("_block", at))),
    ("score", "_block.add", "seconds"): lambda at: Counts(bytes=sum(parts("_block", at))),
    ("score", "_block.result", "seconds"): lambda at: Counts(bytes=sum(parts("_block", at))),
    ("allocate", "_candidates", "seconds"): _offer,
    ("allocate", "round", "gap"): _all_weights,
    ("pack", "about", "gap"): _weights,
    ("pack", "about", "seconds"): _enter,
    ("pack", "compare", "seconds"): _compare,
    ("pack", "add", "seconds"): lambda at: Counts(bytes=returned("compare", at)),
    ("pack", "correct", "gap"): _correct,
    ("pack", "put", "gap"): _weights,
    ("pack", "end", "gap"): _all_weights,
    ("pack", "open", "seconds"): lambda at: Counts(forward(at.model, CONTEXT), weights=at.model.weights),
    ("evaluate", "start", "seconds"): _model,
    ("evaluate", "decode", "seconds"): _decode,
    ("evaluate", "batch", "seconds"): _batch,
}


def counts(stage: str, method: str, label: str, part: str, at: At) -> Counts:
    """Of a call, or of the driver beside it."""
    return ROUND[method](at) if label == "_encode" else COUNTS[stage, label, part](at)


def takes_time(stage: str, label: str, part: str, at: At) -> bool:
    """Whether there are counts; the rest is milliseconds."""
    if (stage, label, part) in (("allocate", "_encode", "seconds"), ("pack", "_encode", "seconds")):
        return True
    if label in ("compare", "add", "correct") and not at.inside:
        return False
    return (stage, label, part) in COUNTS and not (label == "about" and part == "seconds" and at.role != FIRST)


# --- bytes ---------------------------------------------------------------------------------------------------------


def sent(label: str, at: At) -> float:
    """Bytes of a call's arguments."""
    d, t = at.model.width, at.tokens
    if label in ("_forward", "_head"):
        return 4 * t * d
    if label == "_block":
        return 8 * t * d
    if label == "put":
        return 4 * at.out * (at.into + at.inside)
    if label == "_encode":  # of a chain
        return 4 * (at.out * at.into + at.into**2 * at.inside)
    return 0


def returned(label: str, at: At) -> float:
    """Bytes of a call's result; of `_encode`, as `coded` rounds."""
    d, t = at.model.width, at.tokens
    if label == "_embedded":
        return 4 * t * d + 8 * (at.model.vocabulary + CONTEXT)
    if label in ("_forward", "_head", "_block"):
        return 4 * t * d
    if label == "_head.result":
        return 4 * (d**2 + at.model.vocabulary)
    if label == "_block.result":
        return 4 * MOMENTS * d**2
    if label == "compare":
        rest = at.into * at.out + at.out if at.role in WRITERS else at.into**2 + at.into
        return 4 * (lower_size(at.into) + at.into + rest + 1)
    if label == "put":
        return 4 * at.out * at.inside
    if label == "_encode":
        return at.out * at.into + 2 * (at.out + at.into) + HISTOGRAM
    return 0


def parts(label: str, at: At) -> list[int]:
    """Bytes of the parts of a call that are added up on workers: one for each `statistics.Stripe`."""
    d = at.model.width
    if label == "_head":
        return [*(4 * d * len(rows) for rows in cuts(d, d)), 8 * at.model.vocabulary]
    moments = [at.model.shape(role)[side] for side in (1, 0) for role in INSIDE]
    return [4 * n * len(rows) for n in moments for rows in cuts(n, n)]
