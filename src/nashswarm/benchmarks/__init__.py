"""Times and memory on the machine at hand, beside those of other people's products: stages/benchmark.py.

    kernels        products with packed matrices
    decode         a model that writes token by token
    packing        codes to bytes and back
    quantization   score, allocate and pack against the model's size

    timing         interleaved rounds and their spread
    machine        what the figures were measured on
    matrices       random matrices and models in packed form
    matmul_nbits   ONNX Runtime's product with 4-bit weights
    apart          work in a process of its own, whose memory can be told

Each kind has `measure(settings, threads, progress) -> dict`, which is its metrics. A kind more, say of another device,
is one file here, its name in `config.BENCHMARKS` and a line in the stage.
"""
