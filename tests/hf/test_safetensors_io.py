"""safetensors files, read and written."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from phi3_jax import InputError
from phi3_jax.hf import safetensors_io


class TestHeader:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        path = tmp_path / "x.safetensors"
        save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.float16)}, path)
        return path

    def test_empty_tensors_and_scalars(self, tmp_path):
        path = tmp_path / "x.safetensors"
        save_file({"none": np.zeros((0, 3), np.float32), "one": np.array(3, np.float32), "zero": np.zeros(0)}, path)
        header = safetensors_io.read_header(path)
        assert {name: entry.shape for name, entry in header.items()} == {"none": (0, 3), "one": (), "zero": (0,)}
        out = np.empty((), np.float32)
        safetensors_io.read_tensor(header["one"], out)
        assert out == 3

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (b'"shape":[2,3]', b'"shape":[3,3]', "its shape needs 36"),
            (b'"shape":[2,3]', b'"shape":[-2,-3]', "no proper shape"),
            (b'"shape":[2,3]', b'"shape":[2,true]', "no proper shape"),
            (b'"data_offsets":[0,24]', b'"data_offsets":[1,25]', "overlap|leaves a hole"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[16,24]', "overlap"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[28,36]', "hole"),
            (b'"data_offsets":[24,32]', b'"data_offsets":[32,24]', "its shape needs"),
            (b'"b"', b'"a"', "stands twice"),
            (b'"F16"', b'"F99"', "unknown dtype"),
            (b'"dtype":"F16",', b"", "lacks dtype"),
        ],
    )
    def test_broken_headers(self, file, old, new, message):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        assert old in header
        header = header.replace(old, new)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        with pytest.raises(InputError, match=message):
            safetensors_io.read_header(file)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 200))
    def test_damage_is_an_input_error_or_harmless(self, file, position, value, cut):
        data = bytearray(file.read_bytes())
        original = bytes(data)
        data[position % len(data)] = value
        file.write_bytes(data[: len(data) - cut])
        try:
            for entry in safetensors_io.read_header(file).values():
                assert entry.start + int(np.prod(entry.shape)) <= len(data)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        finally:
            file.write_bytes(original)

    def test_file_that_shrinks_while_it_is_read(self, file):
        entry = safetensors_io.read_header(file)["a"]
        file.write_bytes(b"")
        with pytest.raises(InputError, match="became shorter"):
            safetensors_io.read_tensor(entry, np.empty((2, 3), np.float32))
