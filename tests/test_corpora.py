"""Texts: what is read, what they become as tokens, and that calibration and test do not overlap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILIES, PROJECT, tiny_text

from nashswarm import artifacts
from nashswarm.config import CorpusSource
from nashswarm.corpora import (
    SHINGLE,
    SPLITS,
    TokenizedSplit,
    check_disjoint,
    check_long_enough,
    check_paper_length,
    check_run,
    check_vocabulary,
    read_text_file,
    read_texts,
    tokenize,
)
from nashswarm.models import load_tokenizer
from nashswarm.types import InputError

WIKITEXT = PROJECT.parent / "shared/wikitext-2/wiki.test.raw"
NOWHERE = Path("nowhere")


def split_of(ids: np.ndarray) -> TokenizedSplit:
    """A split of one text."""
    return TokenizedSplit(ids.astype(np.int32), ids.astype(np.int32), np.array([ids.size]), np.array([99]))


def random_ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype(np.int32)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT} is not on this machine")
def test_the_papers_filter_finds_its_texts_in_wikitext2() -> None:
    source = CorpusSource("path", test=str(WIKITEXT))
    texts = read_texts("wikitext2", source, NOWHERE, NOWHERE)["test"]
    assert sum(len(t.strip()) > 20 for t in texts) == 2542
    assert texts[0] == " = Robert Boulter = "


def test_a_file_holds_one_text_per_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(" one \n\n   \n\ttwo\u2028still two\nlast".encode())
    assert read_text_file(file) == [" one ", "\ttwo\u2028still two", "last"]


def test_windows_line_ends_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "unix").write_bytes("één\n\ntwo\n".encode())
    (tmp_path / "windows").write_bytes("één\r\n\r\ntwo\r\n".encode())
    assert read_text_file(tmp_path / "windows") == read_text_file(tmp_path / "unix") == ["één", "two"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\r\n"])
def test_an_empty_text_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"empty\.txt: the text is empty"):
        read_text_file(tmp_path / "empty.txt")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("één".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 .*iconv"):
        read_text_file(tmp_path / "latin.txt")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: no such text file; check `corpora`"):
        read_text_file(tmp_path / "gone.txt")


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        read_text_file(tmp_path)


def test_a_path_corpus_has_the_splits_it_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text {name}\n")
    source = CorpusSource("path", calibration=str(tmp_path / "a"), test=str(tmp_path / "b"))
    assert read_texts("mine", source, NOWHERE, NOWHERE) == {"calibration": ["text a"], "test": ["text b"]}


def test_a_path_corpus_without_files_is_refused() -> None:
    with pytest.raises(InputError, match=r"corpora\.mine: no file given; name at least `test`"):
        read_texts("mine", CorpusSource("path"), NOWHERE, NOWHERE)


def test_the_embedded_corpus_lies_with_the_reference_model(tmp_path: Path) -> None:
    for name in ("calibration", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    texts = read_texts("sampled", CorpusSource("embedded"), tmp_path, NOWHERE)
    assert texts == {name: [name] for name in ("calibration", "validation", "test")}


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_own(family: str, tokenizers: Callable[[str], Path]) -> None:
    tokenizer, texts = load_tokenizer(tokenizers(family)), [" a b ", "bitmarket éé", *tiny_text(5, seed=8)]
    split = tokenize(texts, tokenizer)
    assert split.ids.dtype == split.text_ids.dtype == np.int32
    assert split.ids.tolist() == tokenizer("\n\n".join(texts)).input_ids
    assert [split.text(i).tolist() for i in range(len(texts))] == [tokenizer(t).input_ids for t in texts]
    assert split.text_lengths.tolist() == [len(t.strip()) for t in texts]
    assert split.text_ends[-1] == split.text_ids.size
    begins = family != "gpt2"  # with their special token, once for the joined text and once for each single one
    assert (split.ids[0] == tokenizer.eos_token_id) == begins
    assert all((split.text(i)[0] == tokenizer.eos_token_id) == begins for i in range(len(texts)))
    assert tokenizer.decode(split.ids[int(begins) :]) == "\n\n".join(texts)


def test_long_texts_are_tokenized_whole_and_silently(
    tokenizers: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tiny_text(300, seed=9)
    split = tokenize(texts, load_tokenizer(tokenizers("gpt2")))
    assert split.ids.size > 5000
    assert "longer than" not in capfd.readouterr().err


def test_digest_is_of_little_endian_int32() -> None:
    import hashlib

    expected = hashlib.sha256(b"\x01\x00\x00\x00\x00\x01\x00\x00").hexdigest()
    assert artifacts.digest(np.array([1, 256])) == artifacts.digest(np.array([1, 256], ">i8")) == expected


# --- overlap and length --------------------------------------------------------------------------------------------


PLACES = [
    *((at, 37) for at in range(200 - SHINGLE + 1)),
    *((61, there) for there in range(120 - SHINGLE + 1)),
    *((200 - SHINGLE, there) for there in (0, 120 - SHINGLE)),
    (0, 0),
]


def planted(at: int, there: int, length: int) -> dict[str, np.ndarray]:
    """Two splits, of 120 and 200 tokens, that share a run: from `there` in the first, from `at` in the second."""
    one, other = random_ids(120, 1), random_ids(200, 2)
    other[at : at + length] = one[there : there + length]
    return {"c.calibration": one, "c.test": other}


def test_a_shared_run_is_found_wherever_it_lies() -> None:
    for at, there in PLACES:
        says = (
            rf"^c\.test and c\.calibration share 1 runs of {SHINGLE} tokens \(the first at token {at} of c\.test and "
            rf"{there} of c\.calibration\): .*; take it out of one of the two, or name texts that do not overlap"
        )
        with pytest.raises(InputError, match=says):
            check_disjoint(planted(at, there, SHINGLE))


def test_a_run_that_is_a_token_shorter_is_none() -> None:
    for at, there in PLACES:
        check_disjoint(planted(at, there, SHINGLE - 1))


def test_the_first_of_several_shared_runs_is_named_and_quoted() -> None:
    splits = planted(40, 30, SHINGLE + 14)
    with pytest.raises(InputError, match=r"share 15 runs .*at token 40 of c\.test and 30 of c\.calibration, 'w\d+ w"):
        check_disjoint(splits, decode=lambda ids: " ".join(f"w{i}" for i in ids))


def test_order_of_tokens_matters_to_overlap() -> None:
    one = random_ids(SHINGLE, 1)
    check_disjoint({"a": one, "b": one[::-1].copy()})
    with pytest.raises(InputError):
        check_disjoint({"a": one, "b": one.copy()})


def test_splits_shorter_than_a_run_share_none() -> None:
    ids = random_ids(SHINGLE - 1, 1)
    check_disjoint({"a": ids, "b": ids, "c": ids[:0]})


def test_a_text_shorter_than_a_window_is_refused() -> None:
    check_long_enough("corpora.c.test", random_ids(32, 1), 32, "")
    with pytest.raises(InputError, match=r"corpora\.c\.test: 31 tokens do not fill one window of 32"):
        check_long_enough("corpora.c.test", random_ids(31, 1), 32, "")


def test_calibration_is_held_against_the_window_of_scoring() -> None:
    calibration, test = (split_of(random_ids(200, seed)) for seed in range(2))
    splits = {"a": {"calibration": calibration, "test": test}}
    check_run(splits, "a", ["a"], (200, 32))
    with pytest.raises(InputError, match=r"a\.calibration: 200 tokens do not fill one window of 201; give more text$"):
        check_run(splits, "a", ["a"], (201, 32))
    with pytest.raises(InputError, match=r"a\.test: .* of 201; give more text, or lower evaluation\.context$"):
        check_run(splits, "a", ["a"], (32, 201))


def test_tokens_that_the_model_has_no_row_for_are_refused() -> None:
    splits = {"a.test": split_of(np.array([0, 1, 319, 2]))}
    check_vocabulary(splits, 320)
    with pytest.raises(
        InputError, match=r"a\.test: the tokenizer makes token 319 of it, and the model's vocabulary has 319"
    ):
        check_vocabulary(splits, 319)


def test_texts_of_the_papers_protocol_must_fit_the_context() -> None:
    check_paper_length(32, 32)
    with pytest.raises(InputError, match=r"evaluation\.paper\.length: 33 tokens do not fit the model's context of 32"):
        check_paper_length(33, 32)


def test_a_run_needs_calibration_and_tests_that_do_not_overlap() -> None:
    calibration, test, other = (split_of(random_ids(200, seed)) for seed in range(3))
    whole = {"calibration": calibration, "test": test}
    check_run({"a": whole, "b": {"test": other}}, "a", ["a", "b"], (32, 32))
    with pytest.raises(InputError, match=r"corpora\.b\.calibration: this corpus has no calibration split; name a file"):
        check_run({"a": whole, "b": {"test": other}}, "b", ["a"], (32, 32))
    with pytest.raises(InputError, match=r"corpora\.b\.test: this corpus has no test split"):
        check_run({"a": whole, "b": {"calibration": other}}, "a", ["a", "b"], (32, 32))
    with pytest.raises(InputError, match=r"b\.test and a\.calibration share"):
        check_run({"a": whole, "b": {"test": calibration}}, "a", ["a", "b"], (32, 32))
    with pytest.raises(InputError, match=r"corpora\.a\.test: 200 tokens do not fill one window of 256"):
        check_run({"a": {"calibration": split_of(random_ids(300, 5)), "test": test}}, "a", ["a"], (256, 256))


def test_a_validation_split_may_not_hold_the_test() -> None:
    calibration, test = (split_of(random_ids(200, seed)) for seed in range(2))
    splits = {"a": {"calibration": calibration, "validation": test, "test": test}}
    with pytest.raises(InputError, match=r"a\.test and a\.validation share"):
        check_run(splits, "a", ["a"], (32, 32))


def test_a_validation_split_may_not_hold_what_is_calibrated_on() -> None:
    calibration, test = (split_of(random_ids(200, seed)) for seed in range(2))
    splits = {"a": {"calibration": calibration, "validation": calibration, "test": test}}
    with pytest.raises(InputError, match=r"a\.validation and a\.calibration share"):
        check_run(splits, "a", ["a"], (32, 32))


def test_validation_texts_that_nobody_reads_are_not_compared() -> None:
    """Of what is measured on alone: `b` has a validation split that holds its own test."""
    calibration, test, other = (split_of(random_ids(200, seed)) for seed in range(3))
    check_run(
        {"a": {"calibration": calibration, "test": test}, "b": {"validation": other, "test": other}},
        "a",
        ["a", "b"],
        (32, 32),
    )


PAIRS = [("calibration", "test"), ("calibration", "validation"), ("validation", "test")]
COPIED = (
    64  # tokens: what DESIGN calls a run that must not be shared; as text, its ends may merge with their neighbours
)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_copied_text_of_64_tokens_is_found(
    source: str, target: str, family: str, tokenizers: Callable[[str], Path]
) -> None:
    """Whole lines and parts of them, at the beginning, within a line, at a line's border, and at the end."""
    tokenizer = load_tokenizer(tokenizers(family))
    lines = {split: tiny_text(40, seed) for seed, split in enumerate(SPLITS, 30)}
    splits = {split: tokenize(found, tokenizer) for split, found in lines.items()}
    check_run({"a": splits}, "a", ["a"], (32, 32))
    ids, host = splits[source].ids, "\n\n".join(lines[target])
    border = host.index("\n\n", 300)
    ends = (1, ids.size - COPIED)  # behind the special token that some tokenizers begin with
    for start in (*ends, *np.random.default_rng(0).integers(*ends, 20)):
        copied = tokenizer.decode(ids[start : start + COPIED])
        for place in (0, 301, border, border + 2, len(host)):
            text = f"{host[:place]}{copied}{host[place:]}".split("\n\n")
            changed = {**splits, target: tokenize(text, tokenizer)}
            with pytest.raises(InputError, match=rf"a\.{target} and a\.{source} share \d+ runs .*; take it out"):
                check_run({"a": changed}, "a", ["a"], (32, 32))


def test_the_embedded_texts_are_far_from_overlapping() -> None:
    """The longest run that two of them share is of 10 tokens."""
    tokenizer = load_tokenizer(PROJECT / "data/reference")
    texts = read_texts("sampled", CorpusSource("embedded"), PROJECT / "data/reference", NOWHERE)
    ids = {split: tokenize(found, tokenizer).ids for split, found in texts.items()}
    check_disjoint(ids, 11)
    with pytest.raises(InputError):
        check_disjoint(ids, 10)
