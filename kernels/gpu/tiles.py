"""TILES: measured tiles of gemv_streamed, by kind of chip and the weight's rows and columns."""

# (weight rows of an iteration, programs a multiprocessor, warps, stages) as in StreamConfig.
# Written by bench/gpu_tiles.py --write.
TILES: dict[str, dict[tuple[int, int], tuple[int, int, int, int]]] = {
    "NVIDIA H200": {
        (6144, 4096): (1, 4, 4, 4),
        (4096, 4096): (2, 2, 4, 5),
        (28672, 4096): (2, 2, 4, 7),
        (4096, 14336): (1, 1, 8, 7),
        (128256, 4096): (2, 1, 8, 14),
        (3072, 4096): (2, 2, 4, 4),
        (4096, 2048): (4, 2, 4, 4),
        (14336, 4096): (2, 2, 8, 7),
        (4096, 7168): (1, 4, 4, 4),
        (3072, 2048): (4, 2, 4, 4),
        (2048, 2048): (2, 4, 4, 3),
        (16384, 2048): (2, 4, 4, 7),
        (2048, 8192): (1, 4, 4, 4),
        (128256, 2048): (4, 2, 4, 7),
    },
}
