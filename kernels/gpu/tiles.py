"""TILES: measured tiles of kernels of one row, by kind of chip, kind of weight and its shape."""

# (weight rows of an iteration, programs a multiprocessor, warps, stages) as in StreamConfig. None:
# another kernel is faster. Written by bench/gpu_tiles.py --write.
TILES: dict[str, dict[tuple[str, int, int], tuple[int, int, int, int] | None]] = {
    "NVIDIA H200": {
        ("bf16", 6144, 4096): (2, 2, 4, 7),
        ("bf16", 4096, 4096): (1, 4, 4, 4),
        ("bf16", 28672, 4096): (2, 2, 8, 7),
        ("bf16", 4096, 14336): (1, 1, 8, 7),
        ("bf16", 128256, 4096): (2, 1, 8, 14),
        ("bf16", 3072, 4096): (2, 2, 4, 4),
        ("bf16", 4096, 2048): (4, 2, 4, 4),
        ("bf16", 14336, 4096): (2, 2, 8, 7),
        ("bf16", 4096, 7168): (1, 4, 4, 4),
        ("bf16", 3072, 2048): (4, 2, 4, 4),
        ("bf16", 2048, 2048): (2, 4, 4, 3),
        ("bf16", 16384, 2048): (2, 4, 4, 7),
        ("bf16", 2048, 8192): (1, 4, 4, 4),
        ("bf16", 128256, 2048): (4, 2, 4, 7),
        ("bf16", 49152, 576): (4, 4, 4, 7),
        ("fp8", 6144, 4096): (2, 4, 4, 4),
        ("fp8", 4096, 4096): None,
        ("fp8", 28672, 4096): (4, 2, 8, 7),
        ("fp8", 4096, 14336): None,
    },
}
