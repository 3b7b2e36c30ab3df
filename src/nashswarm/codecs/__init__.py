"""One file per codec, found by its name in params.yaml.

A codec is a module with

    Settings                                    a frozen dataclass: the keys that a method may set
    SELLS: tuple[str, ...]                      what an allocator may choose: widths, classes or candidates
    WIDTHS: tuple[int, ...]                     the widths in bits that an allocator may choose from
    encode(job: Job, settings) -> PackedTensor  real bits, nothing that a decoder could not read back
    decode(packed: PackedTensor) -> Tensor      float32 [out, in], exactly the weights that `encode` meant
    offer(job: Job, settings) -> Candidates     where SELLS has candidates: bytes and damage of what a market can buy

A codec whose matrices have tables in common has `round_one(job, settings) -> Rounded` and `assemble(all of them)`, too;
what an interrupted run had rounded is kept by `Rounded.to_arrays` and `from_arrays`, as PackedTensor's for the others.

`tests/test_codecs.py` checks every file here against this contract.
"""
