"""The command `nashswarm`: pack a model, look into a packed one, check it, talk to it, unpack it.

It is the pipeline's library without DVC: the same settings give the same bytes. Errors of ours end with one line and
exit code 2, a directory that `verify` refuses with 1.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.table import Table

from nashswarm.threads import set_threads, wait_asleep

wait_asleep()  # before the imports below load torch

from nashswarm import bitmap, metrics, packed  # noqa: E402
from nashswarm.console import progress  # noqa: E402
from nashswarm.types import InputError, NashSwarmError  # noqa: E402

if TYPE_CHECKING:
    from nashswarm.config import Method

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress causal language models after training, with every byte on disk counted.",
)
Packed = Annotated[Path, typer.Argument(metavar="DIR", help="a packed directory")]
Model = Annotated[str, typer.Argument(help="a directory with config.json, safetensors and a tokenizer, or a hub name")]
Revision = Annotated[str | None, typer.Option(help="the full commit, for a model on the hub (ORGANISATION/NAME)")]
Cache = Annotated[Path, typer.Option(help="where models from the hub are kept")]
CACHE = Path("~/.cache/nashswarm")
TUNED: Mapping[str, Mapping[str, Any]] = {  # codec -> what params.yaml's markets say beside its defaults
    "coded": {"prefix_tokens": 32768},
    "tiles": {"columns": 64},
}
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of tables")]
console = Console()


def main() -> None:
    """What the command runs."""
    logging.basicConfig(format="%(message)s")
    try:
        app()
    except NashSwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# --- making --------------------------------------------------------------------------------------------------------


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="where the packed directory goes")],
    text: Annotated[Path, typer.Option(help="calibration text, UTF-8, one text per line; not what you measure on")],
    bits: Annotated[
        float, typer.Option(help="budget: true bits per weight, of all bytes that rebuild the weights")
    ] = 3,
    codec: Annotated[str, typer.Option(help="coded (smallest) or tiles (fixed widths, for kernels)")] = "coded",
    method: Annotated[Path | None, typer.Option(help="a YAML file with one method, as in params.yaml")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of a method; may come again")] = None,
    tokens: Annotated[int, typer.Option(help="of calibration, for the statistics")] = 32768,
    name: Annotated[str | None, typer.Option(help="the model's name in the manifest; else its directory's")] = None,
    revision: Revision = None,
    cache: Cache = CACHE,
    threads: Annotated[int, typer.Option(help="late digits follow their number, as in compute.threads")] = 2,
    as_json: Json = False,
) -> None:
    """Pack a model: gather statistics, let the market buy bits up to the budget, write and verify the files.

    nashswarm quantize ./gpt2 --text train.txt --bits 3 -o gpt2-3bit
    """
    from nashswarm import direct, downloads
    from nashswarm.config import Scoring

    set_threads(threads)
    chosen = _method(method, bits, codec, setting or [])
    scoring = Scoring(tokens=tokens)
    source, origin = downloads.resolve_word(model, revision, cache.expanduser())
    name = name or (origin.id or source.resolve().name).rpartition("/")[2]
    direct.quantize_directory(source, text, chosen, name, scoring, output, progress, origin)
    inspect(output, as_json=as_json)


@app.command()
def estimate(
    model: Model,
    bits: Annotated[float, typer.Option(help="budget: true bits per weight")] = 3,
    codec: Annotated[str, typer.Option(help="coded or tiles")] = "coded",
    method: Annotated[Path | None, typer.Option(help="a YAML file with one method, as in params.yaml")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of a method; may come again")] = None,
    tokens: Annotated[int, typer.Option(help="of calibration, for the statistics")] = 32768,
    revision: Revision = None,
    cache: Cache = CACHE,
    as_json: Json = False,
) -> None:
    """Say what `quantize` will need of memory, disk and time. Exit code 2, and what to lower, where it does not fit."""
    from nashswarm import downloads, models, preflight
    from nashswarm.config import Scoring

    source = downloads.resolve_word(model, revision, cache.expanduser())[0]
    models.checkpoint_files(source)  # before transformers sees the directory, as in `quantize`
    index = models.describe(source)
    chosen = _method(method, bits, codec, setting or [])
    needs = preflight.needs(index, chosen, Scoring(tokens=tokens), preflight.token_seconds(index))
    if as_json:
        print(json.dumps([dataclasses.asdict(need) for need in needs], indent=2))
    else:
        table = Table("step", "memory", "disk", "time", title=f"{index.parameters:,} parameters, about")
        for need in needs:
            memory, disk = need.memory / preflight.GIB, need.disk / preflight.GIB
            table.add_row(need.step, f"{memory:.1f} GiB", f"{disk:.1f} GiB", f"{need.seconds / 60:.0f} minutes")
        console.print(table)
    preflight.check(needs, Path())


def _method(file: Path | None, bits: float, codec: str, changes: Sequence[str]) -> Method:
    """The one in the file, else params.yaml's market for that budget, with changes."""
    from nashswarm.config import parse_method

    block: dict[str, Any] = {"allocator": "market", "codec": codec, "budget": float(bits), **TUNED.get(codec, {})}
    name = f"market-{codec}-{block['budget']}".replace(".", "_")
    if file is not None:
        try:
            ((name, own),) = yaml.safe_load(file.read_text(encoding="utf-8")).items()
            block = dict(own)
        except (OSError, UnicodeDecodeError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"{file}: not one method by its name, as under `methods` in params.yaml ({error})"
            ) from error
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: give KEY=VALUE, for example columns=64")
        block[key] = yaml.safe_load(value)
    return parse_method(name, block)


@app.command()
def unpack(
    directory: Packed,
    output: Annotated[Path, typer.Option("-o", "--output", help="where the plain model goes")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="of the weights")] = "float32",
) -> None:
    """Write a packed model as plain safetensors, which any program reads, at full size."""
    from nashswarm import direct

    direct.unpack_directory(directory, output, dtype)
    console.print(f"{output}: {sum(p.stat().st_size for p in output.iterdir()):,} bytes of {dtype}")


@app.command()
def export(
    directory: Packed,
    output: Annotated[Path, typer.Option("-o", "--output", help="the directory to write")],
    to: Annotated[str, typer.Option(help="gguf or compressed-tensors")] = "gguf",
    as_json: Json = False,
) -> None:
    """Write a packed model in another program's format, where that can hold it exactly; else say why not.

    Pack with --method a file with codec grouped or gptq, symmetric: true, bits 4 or 8 and groups of a multiple of 32
    (for compressed-tensors also scope: linear); GGUF also knows 4 bits with zeros whose product with the scale is a
    float16. What is written is read back by the
    format's own library and compared weight by weight.
    """
    from nashswarm import exports

    opened = packed.open_packed(directory)
    count = exports.export(directory, output, to)
    bits = 8 * count / opened.provenance.parameters
    own = 8 * opened.size.file_bytes / opened.provenance.parameters
    if as_json:
        print(json.dumps({"format": to, "file_bytes": count, "bits_per_weight": bits, "packed_bits_per_weight": own}))
        return
    console.print(f"{output}: {count:,} bytes of {to}, {bits:.4f} true bits per weight ({own:.4f} packed)")
    console.print("every weight reads back as it was packed, so its loss is the packed model's")


# --- looking -------------------------------------------------------------------------------------------------------


@app.command()
def inspect(directory: Packed, as_json: Json = False) -> None:
    """Show where the bytes and the bits of a packed model are, and the certificate of the market that bought them."""
    document = describe(directory)
    if as_json:
        print(json.dumps(document, indent=2, sort_keys=True))
        return
    size, method = document["size"], document["method"]
    console.print(f"{document['model']} ({document['architecture']}, {document['parameters']:,} parameters)")
    console.print(f"method {method['name']}: codec {method['codec']}, allocator {method['allocator']}")
    table = Table("part", "bytes", "bits per weight", title=f"{size['bits_per_weight']:.4f} true bits per weight")
    for part, count in sorted(size["parts"].items(), key=lambda item: -item[1]):
        table.add_row(part, f"{count:,}", f"{8 * count / document['parameters']:.4f}")
    table.add_section()
    table.add_row("all", f"{size['file_bytes']:,}", f"{size['bits_per_weight']:.4f}")
    console.print(table)
    if found := bitmap.bit_map(document["tensors"]):
        console.print(_map_table(found))
    certificate = {k: v for k, v in document["certificate"].items() if k != "histogram" and v is not None}
    if certificate:
        table = Table("certificate", "", show_header=True)
        for key, value in certificate.items():
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        console.print(table)


def describe(directory: Path) -> dict[str, Any]:
    """What `inspect` shows, of a verified directory. `size.parts` sum to `size.file_bytes`; `files` are all files."""
    from nashswarm.models import describe as index_of

    opened = packed.open_packed(directory)
    provenance = dataclasses.asdict(opened.provenance)
    size = opened.size
    return {
        **provenance,
        "format": packed.FORMAT,
        "size": {
            "file_bytes": size.file_bytes,
            "bits_per_weight": 8 * size.file_bytes / opened.provenance.parameters,
            "parts": dict(size.parts),
        },
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
        "tensors": metrics.tensor_rows(opened, index_of(directory)),
    }


def _map_table(found: bitmap.BitMap) -> Table:
    table = Table("layer", *found.columns, title="bits per weight of each matrix")
    for layer in found.layers:
        cells = (found.cells.get((layer, column)) for column in found.columns)
        table.add_row(str(layer), *("" if bits is None else f"{bits:.2f}" for bits in cells))
    if found.outside:
        table.caption = ", ".join(f"{name} {bits:.2f}" for name, bits in found.outside.items())
    return table


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="packed directories")],
    decode: Annotated[bool, typer.Option("--decode", help="decode every matrix, too: slower by far")] = False,
    as_json: Json = False,
) -> None:
    """Compare every file with its SHA-256, and the manifest with the arrays. Exit code 1 where one is refused."""
    if decode:
        from nashswarm.loading import dequantized

    found: dict[str, str | None] = {}
    for directory in directories:
        try:
            opened = packed.open_packed(directory)
            if decode and opened.provenance.method["codec"] != "source":  # a baseline stores no weights
                names = [*opened.tensors, *opened.vectors]
                for _ in zip(progress(names, str(directory)), dequantized(opened), strict=False):
                    pass
            found[str(directory)] = None
        except NashSwarmError as error:
            found[str(directory)] = str(error)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, problem in found.items():
            print(f"{name}: sound" if problem is None else f"{name}: refused: {problem}")
    if any(problem is not None for problem in found.values()):
        raise typer.Exit(1)


@app.command()
def generate(
    directory: Packed,
    prompt: Annotated[str, typer.Argument(help="what the text begins with")],
    tokens: Annotated[int, typer.Option(help="to write at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time")] = 0.0,
    seed: Annotated[int, typer.Option(help="of drawing, with a temperature")] = 0,
    as_json: Json = False,
) -> None:
    """Let a packed model go on with a text."""
    import torch

    from nashswarm.loading import load
    from nashswarm.models import load_tokenizer

    model, tokenizer = load(directory), load_tokenizer(directory)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if not ids.numel():
        raise InputError("PROMPT: it has no tokens; give at least one word")
    torch.manual_seed(seed)
    drawing: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        drawing["temperature"] = temperature
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=tokens, pad_token_id=model.config.eos_token_id, **drawing)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(json.dumps({"prompt": prompt, "text": text}) if as_json else text)


if __name__ == "__main__":
    main()
