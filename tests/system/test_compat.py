"""The insides of other libraries are still as this package takes them to be."""

import pyarrow
import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from phi3_jax.system.compat import is_compressed, step_state


class TestTokenizers:
    def test_steps_say_what_they_consist_of(self):
        assert step_state(None) is None
        split = pre_tokenizers.Split(Regex("a+"), "isolated")
        assert step_state(split)["pattern"] == {"Regex": "a+"}
        (state,) = step_state(pre_tokenizers.Sequence([split]))["pretokenizers"]
        assert state["type"] == "Split"
        assert step_state(normalizers.Replace(Regex("b"), ""))["pattern"] == {"Regex": "b"}

    def test_decoders_have_their_types(self):
        assert step_state(decoders.ByteLevel())["type"] == "ByteLevel"
        state = step_state(decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))
        assert [part["type"] for part in state["decoders"]] == ["ByteFallback", "Fuse"]


class TestArrow:
    @pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded by a dictionary"])
    @pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
    def test_compressed_messages_are_known_by_their_metadata(self, compression, coded):
        table = pyarrow.table({"text": ["abc", "d"] * 100, "number": range(200)})
        if coded:
            table = table.set_column(0, "text", table["text"].dictionary_encode())
        sink = pyarrow.BufferOutputStream()
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        found = {
            message.type: is_compressed(message) for message in pyarrow.ipc.MessageReader.open_stream(sink.getvalue())
        }
        assert found == {
            "schema": False,
            "record batch": compression is not None,
            **({"dictionary": compression is not None} if coded else {}),
        }
