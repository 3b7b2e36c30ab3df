"""One file per allocator, found by its name in params.yaml; numpy and the standard library only.

An allocator is a module with

    Settings                                    a frozen dataclass: the keys that a method may set
    BUYS: str                                   what it chooses: widths, classes or candidates
    NEEDS_IMPORTANCE: bool                      whether it looks at Offer.importance
    widths(settings) -> tuple[int, ...]         the widths in bits that it may choose
    allocate(offers: Iterable[Offer], settings) -> Allocation

Offers arrive one at a time and may hold a whole importance map: take what is needed from one before asking for the
next. `tests/test_allocators.py` checks every file here against this contract.
"""
