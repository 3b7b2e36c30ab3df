"""Times and memory on the machine at hand, beside those of other people's products: stages/benchmark.py.

    kernels        products with packed matrices
    decode         a model that writes token by token
    packing        codes to bytes and back
    quantization   score, allocate and pack against the model's size

    recording      every task's seconds and bytes, as the pipeline calls it
    workload       what each of them computes and moves, as formulas
    costs          seconds as a fitted sum of counts over rates
    schedule       what many workers make of tasks whose times are known
    scale          from these to larger models and more machines; tables of it
    workers        two Ray workers against one process

    timing         interleaved rounds and their spread
    machine        what the figures were measured on
    matrices       random matrices and models in packed form
    matmul_nbits   ONNX Runtime's product with 4-bit weights
    apart          work in a process of its own, whose memory can be told

Each kind has `measure(settings, threads, progress) -> dict`, which is its metrics. A kind more, say of another device,
is one file here, its name in `config.BENCHMARKS` and a line in the stage.
"""
