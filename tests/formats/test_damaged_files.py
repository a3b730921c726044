"""Damaged weight files give one clear line, or exactly the tensors that they still describe."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.weights.lora_files import load_adapter

LORA = "transformer.transformer_blocks.{}.attn.to_q.{}"
TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}
NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 2**31, 2**63, 2**64, 1e300, 0.5, "8", None, [], True)


def small_file() -> bytes:
    """A LoRA of two layers, in four types."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer, dtype in enumerate((np.float32, ml_dtypes.bfloat16)):
        tensors[LORA.format(layer, "lora_A.weight")] = rng.normal(size=(2, 4)).astype(dtype)
        tensors[LORA.format(layer, "lora_B.weight")] = rng.normal(size=(4, 2)).astype(np.float16)
    tensors[LORA.format(0, "alpha")] = np.array([1.0], np.float64)
    return save(tensors, {"lora_adapter_metadata": json.dumps({"lora_alpha": 4, "r": 2})})


def split(file: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(file[:8], "little")
    return file[8 : 8 + size], file[8 + size :]


def joined(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


def cut(rng: random.Random, file: bytes) -> bytes:
    return file[: rng.randrange(len(file))]


def flipped(rng: random.Random, file: bytes) -> bytes:
    """A few bytes of the header, its length among them, are others."""
    end = 8 + len(split(file)[0])
    spoilt = bytearray(file)
    for _ in range(rng.randint(1, 3)):
        spoilt[rng.randrange(end)] = rng.randrange(256)
    return bytes(spoilt)


def edited(rng: random.Random, file: bytes) -> bytes:
    """Valid JSON that says something else: names, types, shapes, places."""
    text, data = split(file)
    header = json.loads(text)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    match rng.randrange(8):
        case 0:
            entry["dtype"] = rng.choice([*TYPES, "BOOL", "F8_E8M0", "X", "", None, 3])
        case 1:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
        case 2:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
        case 3:
            entry["data_offsets"] = rng.choice(([], [0], [0, 1, 2], "x", None, {}))
        case 4:
            header[rng.choice((name + "x", "", "é\u0000", name[:-1]))] = header.pop(name)
        case 5:
            del header[name][rng.choice(("dtype", "shape", "data_offsets"))]
        case 6:
            other = rng.choice([key for key in header if key != "__metadata__"])
            header[name], header[other] = header[other], header[name]
        case 7:
            said = rng.choice(
                ('{"lora_alpha": "x"}', '{"lora_alpha": NaN}', "[", "[" * 10_000, "3")
            )
            header["__metadata__"] = rng.choice(({"lora_adapter_metadata": said}, {"a": 3}, 3, []))
    return joined(json.dumps(header).encode(), data)


def replaced(rng: random.Random, file: bytes) -> bytes:
    """A header that is no header, or one of another length."""
    header, data = split(file)
    match rng.randrange(4):
        case 0:
            nothing = (b"", b"{}", b"[]", b"null", b"{" * 200, b"[" * 100_000, b"\xff\xfe{}")
            return joined(rng.choice(nothing), data)
        case 1:
            return joined(
                header, data, rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(header) - 1))
            )
        case 2:
            return joined(header, data + bytes(rng.randint(1, 9)))
        case _:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))


DAMAGES = (cut, flipped, edited, replaced)


def described(file: bytes) -> dict[str, np.ndarray]:
    """What the header says is there, by another reader."""
    text, data = split(file)
    tensors = {}
    for name, entry in json.loads(text).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            flat = np.frombuffer(data[start:stop], TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_thousand_damaged_files(tmp_path):
    whole, rng = small_file(), random.Random(0)
    path = tmp_path / "x.safetensors"
    refused = read = loaded = 0
    lines = []
    for i in range(1000):
        file = DAMAGES[i % len(DAMAGES)](rng, whole)
        path.write_bytes(file)
        try:
            tensors = open_tensors(path)
            arrays = {name: tensors.read(name) for name in tensors.shapes}
            rows = {name: tensors.read(name, slice(0, 1)) for name, a in arrays.items() if a.ndim}
        except UserError as error:
            lines.append(str(error))
            refused += 1
            continue
        read += 1
        expected = described(file)
        assert arrays.keys() == expected.keys()
        assert all(same(array, expected[name]) for name, array in arrays.items())
        assert all(same(array, expected[name][:1]) for name, array in rows.items())
        try:
            adapter = load_adapter(path).adapter
        except UserError as error:
            lines.append(str(error))
            continue
        loaded += 1
        for factors in adapter.values():
            assert np.isfinite(factors.strength)
            a = expected[f"{factors.name}.lora_A.weight"].astype(np.float32)
            assert np.array_equal(factors.a.T, a, equal_nan=True)
    assert all(one_line(line, path) for line in lines)
    # Most are refused; some damages are only to names or text, or make another good file.
    assert refused > 700
    assert read > 80
    assert loaded > 10


def one_line(said: str, path: Path) -> bool:
    return "\n" not in said and str(path) in said and len(said) < 2000


@pytest.mark.parametrize(
    "weight_map",
    [
        [],
        3,
        None,
        {"a": 3},
        {"a": None},
        {"a": ["x"]},
        {"a": ""},
        {"a": "."},
        {"a": "no"},
        {"a": "\0"},
    ],
)
def test_indices_that_are_none(tmp_path, weight_map):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as error:
        open_tensors(index)
    assert one_line(str(error.value), index)


def test_indices_that_are_cut(tmp_path):
    index = tmp_path / "x.safetensors.index.json"
    (tmp_path / "a.safetensors").write_bytes(small_file())
    text = json.dumps({"weight_map": {LORA.format(0, "alpha"): "a.safetensors"}})
    for stop in range(len(text)):
        index.write_text(text[:stop])
        with pytest.raises(UserError):
            open_tensors(index)
