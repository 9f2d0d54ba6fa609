"""Split GGUF files: named by any part or the folder, loaded whole, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo._core import GgufFile, Tokenizer
from octavo.checkpoints.gguf_parts import first_parts, hub_parts, open_gguf, part_names
from octavo.config import EngineConfig
from octavo.errors import ModelLoadError
from octavo.models.source import resolve_model

NUM_TENSORS = 5


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The folder of a checkpoint of five tensors, two a file."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|im_end|>", "ab"])
    writer.add_token_types([1, 1, 3, 1])
    writer.add_token_merges(["a b"])
    for number in range(NUM_TENSORS):
        writer.add_tensor(f"t{number}", np.full((3, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    return tmp_path


def part(folder: Path, number: int) -> Path:
    return folder / f"m-{number:05d}-of-00003.gguf"


def test_all_tensors_of_all_parts(split: Path) -> None:
    for number in (1, 2, 3):
        file = open_gguf(part(split, number))
        assert sorted(file.tensors()) == [f"t{n}" for n in range(NUM_TENSORS)]
        for n in range(NUM_TENSORS):
            out = np.empty((3, 32), np.float32)
            file.dequantize(f"t{n}", out)
            assert (out == n).all()
            assert bytes(file.data(f"t{n}")) == out.tobytes()
        file.release_pages()
        assert bytes(file.data("t4")) == out.tobytes()
        assert Tokenizer.from_gguf(file).encode("ab<|im_end|>") == [3, 2]
        assert file.path == str(part(split, 1))


def test_a_model_is_named_by_any_part_or_its_folder(split: Path) -> None:
    for name in (part(split, 1), part(split, 2), split):
        source = resolve_model(EngineConfig(model=str(name)))
        assert (source.kind, source.path, source.name) == ("gguf", part(split, 1), str(name))
        assert source.gguf_files == [part(split, n) for n in (1, 2, 3)]
        assert source.gguf is not None
        assert len(source.gguf.tensors()) == NUM_TENSORS
    other = EngineConfig(model=str(split), tokenizer=str(part(split, 3)))
    assert resolve_model(other).tokenizer.vocab_size == 4


@pytest.mark.parametrize("missing", [1, 3])
def test_a_missing_part_is_named(split: Path, missing: int) -> None:
    part(split, missing).unlink()
    for name in (part(split, 2), split):
        with pytest.raises(ModelLoadError, match=f"part m-0000{missing}-of-00003.gguf of this"):
            resolve_model(EngineConfig(model=str(name)))


def rename(folder: Path, names: dict[str, str]) -> None:
    for old in names:
        (folder / old).rename(folder / f"{old}.old")
    for old, new in names.items():
        (folder / f"{old}.old").rename(folder / new)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: rename(
                folder, {part(folder, 2).name: part(folder, 3).name,
                         part(folder, 3).name: part(folder, 2).name}
            ),
            "is part 3 of 3; it was opened as part 2 of 3",
        ),
        (
            lambda folder: part(folder, 3).write_bytes(part(folder, 2).read_bytes()),
            "is part 2 of 3; it was opened as part 3 of 3",
        ),
        (lambda folder: part(folder, 2).write_bytes(b"GGUF"), "m-00002-of-00003.gguf: the file ends"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(
    split: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(split)
    with pytest.raises(ModelLoadError, match=message):
        open_gguf(part(split, 1))


def test_a_part_under_another_name_is_no_model(split: Path) -> None:
    rename(split, {part(split, 1).name: "alone.gguf"})
    with pytest.raises(ModelLoadError, match="is part 1 of 3; it was opened as part 1 of 1"):
        open_gguf(split / "alone.gguf")


def test_a_whole_file_is_no_part(split: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(part(split, 2), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="is a whole model; it was opened as part 2 of 3"):
        open_gguf(part(split, 3))


def test_names_of_parts() -> None:
    assert part_names("a-00002-of-00003.gguf") == [f"a-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for whole in ("a.gguf", "a-1-of-2.gguf", "a-00003-of-00002.gguf", "a-00000-of-00002.gguf"):
        assert part_names(whole) == [whole]
    assert hub_parts("Q4/a-00001-of-00002.gguf") == [
        "Q4/a-00001-of-00002.gguf",
        "Q4/a-00002-of-00002.gguf",
    ]
    found = [
        Path(f"/m/{name}") for name in ("b-00002-of-00002.gguf", "b-00001-of-00002.gguf", "a.gguf")
    ]
    assert first_parts(found) == [Path("/m/a.gguf"), Path("/m/b-00001-of-00002.gguf")]


def test_parts_of_a_hub_s_file(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(repo: str, file: str, **where: Any) -> str:
        asked.append((repo, file))
        return str(split / Path(file).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    source = resolve_model(EngineConfig(model="some/model/Q4/m-00002-of-00003.gguf"))
    assert asked == [("some/model", f"Q4/m-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    assert source.path == part(split, 1)


def test_two_parts_may_not_hold_one_tensor(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"x{number}.gguf") for number in (0, 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_tensor("same", np.zeros((1, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(ValueError, match=r'x1\.gguf: tensor "same" is in another part, too'):
        GgufFile(*paths)
