TRANSFORMERS = "5.24.0"
REFUSED: dict[str, str] = {}
OTHER_SIZES: tuple[str, ...] = ()
