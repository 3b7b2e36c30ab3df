"""Products with matrices that stay packed: y = W x from the bits of the codec `tiles`, on the processor or a GPU.

    build      finds or compiles tiles.cpp
    matrix     one matrix, and its product with up to 8 rows of activations at a time
    gpu        the same matrix on a GPU, with up to 16 rows; its kernels, in Triton, are in triton_tiles
    hopper     its kernels, in CUDA C++, for the cards and tiles that have their own
    writing    blocks of GPT-2 that take a token through all of their steps in one call
    serving    a model that is resident in packed form, whose layers use these products

No stage of the pipeline but `benchmark` imports this package, so no other tracked result depends on a compiler or a
processor.
"""
