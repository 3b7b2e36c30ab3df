"""Texts to calibrate and measure on: where they come from, how they become token ids, and that they do not overlap.

A local file holds one text per line; blank lines separate nothing and are dropped. The standard protocol joins the
texts of a split with blank lines and tokenises the whole once; the paper's protocol takes the texts one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nashswarm.config import CorpusSource
from nashswarm.types import InputError, TokenizedSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("calibration", "validation", "test")
HUB_SPLITS = {"calibration": "train", "validation": "validation", "test": "test"}
# Tokens: the shortest run that counts as an overlap between splits, as in Lee et al., 2022 (arXiv:2107.06499). Of 64
# tokens' text copied into other text 60 or more stayed a run, for its ends merge with their neighbours (4,000 copies);
# the longest run that unrelated texts shared was 41 (docs/decisions.md, Protocol).
SHINGLE = 50
QUOTED = 12  # tokens of it, in the error


def read_texts(name: str, source: CorpusSource, reference: Path, hub_directory: Path) -> dict[str, list[str]]:
    """The texts of every split that the corpus has.

    Arguments: `reference`, where the embedded texts lie; `hub_directory`, where a hub corpus was fetched to.
    Raises InputError for a file that is missing, empty or not UTF-8.
    """
    if source.source == "embedded":
        return {split: read_text_file(reference / f"{split}.txt") for split in SPLITS}
    if source.source == "path":
        files = {split: getattr(source, split) for split in SPLITS if getattr(source, split)}
        if not files:
            raise InputError(f"corpora.{name}: no file given; name at least `test`")
        return {split: read_text_file(Path(file)) for split, file in files.items()}
    from nashswarm import hub

    return {split: hub.read_dataset(hub_directory, HUB_SPLITS[split]) for split in SPLITS}


def read_text_file(path: Path) -> list[str]:
    """The non-blank lines of a UTF-8 file, line ends removed."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such text file; check `corpora` in params.yaml") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); convert it, e.g. with iconv") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a readable text file") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{path}: the text is empty; give a file with text, or check `corpora` in params.yaml")
    return texts


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenizedSplit:
    """Both protocols' token ids, with the tokenizer's own special tokens (OPT and Llama begin with one)."""
    joined = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    singles = tokenizer(list(texts), verbose=False)["input_ids"]
    return TokenizedSplit(
        ids=np.array(joined, np.int32),
        text_ids=np.concatenate([np.array(s, np.int32) for s in singles]),
        text_ends=np.cumsum([len(s) for s in singles]),
        text_lengths=np.array([len(t.strip()) for t in texts]),
    )


def check_vocabulary(texts: Mapping[str, TokenizedSplit], rows: int) -> None:
    """Raise InputError for a token that the model has no row for. Arguments: `texts`, by what errors call them."""
    for where, tokens in texts.items():
        highest = max(int(ids.max(initial=0)) for ids in (tokens.ids, tokens.text_ids))
        if highest >= rows:
            raise InputError(
                f"{where}: the tokenizer makes token {highest} of it, and the model's vocabulary has {rows}; is it "
                "this model's tokenizer?"
            )


def check_long_enough(where: str, ids: np.ndarray, window: int, advice: str) -> None:
    """Raise InputError where a split does not fill one window of the model."""
    if ids.size < window:
        raise InputError(f"{where}: {ids.size} tokens do not fill one window of {window}; give more text{advice}")


def check_paper_length(length: int, context: int) -> None:
    """Raise InputError where the texts of the paper's protocol would not fit into the model's context."""
    if length > context:
        raise InputError(
            f"evaluation.paper.length: {length} tokens do not fit the model's context of {context}; lower it to that"
        )


def check_disjoint(
    splits: Mapping[str, np.ndarray], shingle: int = SHINGLE, decode: Callable[[list[int]], str] | None = None
) -> None:
    """Raise InputError where two splits share a run of `shingle` tokens; names both, and where the first one lies.

    Arguments: `decode`, token ids -> text, to quote how that run begins.
    """
    seen: list[tuple[str, np.ndarray]] = []
    for name, ids in splits.items():
        hashes = _shingle_hashes(ids, shingle)
        for other, others in seen:
            shared = np.flatnonzero(np.isin(hashes, others))
            if shared.size:
                at = int(shared[0])
                there = int(np.flatnonzero(others == hashes[at])[0])
                quoted = f", {decode(ids[at : at + QUOTED].tolist())!r}" if decode else ""
                raise InputError(
                    f"{name} and {other} share {shared.size} runs of {shingle} tokens (the first at token {at} of "
                    f"{name} and {there} of {other}{quoted}): do not measure on what was calibrated on; take it out of "
                    "one of the two, or name texts that do not overlap in params.yaml"
                )
        seen.append((name, hashes))


def _shingle_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """uint64 [tokens - length + 1]: a polynomial hash of every run; two of 10^6 runs collide with chance 10^-7."""
    count = max(0, ids.size - length + 1)
    values = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(29)
    total = np.zeros(count, np.uint64)
    for offset in range(length):
        total = total * np.uint64(0xD1342543DE82EF95) + values[offset : offset + count]
    return total


def check_run(
    splits: Mapping[str, Mapping[str, TokenizedSplit]],
    calibration: str,
    measured: Sequence[str],
    windows: tuple[int, int],
    decode: Callable[[list[int]], str] | None = None,
) -> None:
    """Refuse corpora that cannot serve: missing or short splits, and text that two splits share which must not.

    Calibration, validation and test of what is calibrated on are held against each other, and the former two against
    the test of every corpus that is measured on.

    Arguments: `splits`, corpus -> split -> tokens; `calibration`, the corpus to calibrate on; `measured`, those to
    measure on; `windows`, tokens of one when calibrating and when measuring; `decode`, as `check_disjoint` takes it.
    Raises InputError.
    """
    needed = [(calibration, "calibration"), *((corpus, "test") for corpus in measured)]
    advice = ("", *[", or lower evaluation.context"] * len(measured))
    for (corpus, split), hint in zip(needed, advice, strict=True):
        window = windows[bool(hint)]
        if split not in splits[corpus]:
            raise InputError(
                f"corpora.{corpus}.{split}: this corpus has no {split} split; name a file for it in params.yaml"
            )
        check_long_enough(f"corpora.{corpus}.{split}", splits[corpus][split].ids, window, hint)
    own = [(calibration, split) for split in ("calibration", "validation") if split in splits[calibration]]
    ids = {(corpus, split): splits[corpus][split].ids for corpus, split in [*own, *needed[1:]]}
    for one, other in [*combinations(own, 2), *product(own, needed[1:])]:
        check_disjoint({".".join(pair): ids[pair] for pair in (one, other)}, decode=decode)
