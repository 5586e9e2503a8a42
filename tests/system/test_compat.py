"""The insides of other libraries are still as this package takes them to be."""

import argparse
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonargparse
import numpy as np
import pyarrow
import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from phi3_jax.system.compat import (
    EventFile,
    adds_to_some_of_a_scan,
    harness_command,
    hide_options,
    is_compressed,
    ngram_counts,
    option_strings,
    options_of,
    positionals,
    score_of_counts,
    step_state,
)


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


class TestSacrebleu:
    @pytest.mark.parametrize("name", ["BLEU", "CHRF"])
    def test_summed_counts_give_the_score_of_the_set(self, name):
        metrics = pytest.importorskip("sacrebleu.metrics")
        scorer = getattr(metrics, name)()
        answers, references = ["the cat sat on a mat", "no", ""], ["the cat sat on the mat", "yes and no", "a"]
        counts = ngram_counts(scorer, answers, references)
        assert len(counts) == 3
        score = score_of_counts(scorer, [sum(column) for column in zip(*counts, strict=True)])
        assert score == pytest.approx(scorer.corpus_score(answers, [references]).score)
        assert score > 0


class TestLmEval:
    def test_the_command_parses_and_is_not_yet_executed(self, capsys):
        pytest.importorskip("lm_eval")
        before = list(sys.argv)
        command, arguments = harness_command(["run", "--model", "a", "--tasks", "b", "--limit", "2"])
        assert (arguments.model, arguments.limit) == ("a", 2)
        assert callable(command.execute)
        # What is not given is left for the harness's own configuration to fill in.
        assert not hasattr(arguments, "batch_size")
        with pytest.raises(SystemExit):
            harness_command(["run", "--no-such-option"])
        assert "--no-such-option" in capsys.readouterr().err.splitlines()[-1]
        assert sys.argv == before


class TestTensorBoard:
    def test_events_are_in_the_file_once_flushed(self, tmp_path):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        path = tmp_path / "events.out.tfevents.1.host"
        file = EventFile(path)
        file.restart(8)
        file.scalar(8, "train/loss", 0.25)
        file.flush()
        data, events = path.read_bytes(), []
        while data:  # length, its checksum, the event, its checksum
            end = 12 + int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12:end]))
            data = data[end + 4 :]
        version, restart, point = events
        assert version.file_version == "brain.Event:2"
        assert (restart.step, restart.session_log.status) == (8, SessionLog.START)
        assert (point.step, point.summary.value[0].tag, point.summary.value[0].simple_value) == (8, "train/loss", 0.25)
        file.close()


@dataclass
class Section:
    """A section.

    Args:
        key: What it holds.
    """

    key: str = "x"


@pytest.mark.parametrize("kind", [argparse.ArgumentParser, jsonargparse.ArgumentParser])
def test_a_parser_knows_the_names_of_its_options(kind):
    parser = kind()
    parser.add_argument("--one", "-o")
    parser.add_mutually_exclusive_group().add_argument("--two")
    assert option_strings(parser) == ["-h", "--help", "--one", "-o", "--two"]


def test_a_parser_knows_its_arguments_and_their_values():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--one", "-o", choices=("a", "b"), help="The first.")
    parser.add_argument("--two", action="store_true", help=argparse.SUPPRESS)
    assert positionals(parser) == {"file": "FILE"}
    assert options_of(parser) == [("--one", "The first.", ("a", "b"), True), ("--two", "", (), False)]


def test_an_option_for_a_whole_section_can_be_hidden():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Section, "model")
    assert "--model CONFIG" in parser.format_help()
    hide_options(parser, {"model"})
    assert "--model CONFIG" not in parser.format_help()
    assert "--model.key KEY" in parser.format_help()


class TestJax:
    def test_gradients_are_taken_one_for_another_where_some_of_a_scan_are_parameters(self):
        """If this fails on the oldest JAX that is supported, `adds_to_some_of_a_scan` may go."""

        def total(made_of, as_it_is):
            def layer(carry, scanned):
                return carry + jnp.sum(jnp.sin(scanned[0])) * jnp.sum(jnp.cos(scanned[1])), None

            return jax.lax.scan(layer, 0.0, (2 * made_of, as_it_is))[0]

        @jax.jit
        def accumulated(*params):
            sums = tuple(jax.new_ref(jnp.zeros_like(x)) for x in params)
            jax.vjp(total, *params)[1].with_refs(*sums)(1.0)
            return [ref[...] for ref in sums]

        params = jnp.arange(6.0).reshape(3, 2), jnp.arange(7.0, 13).reshape(3, 2)
        pairs = zip(accumulated(*params), jax.grad(total, (0, 1))(*params), strict=True)
        assert all(np.allclose(*pair, rtol=1e-5) for pair in pairs) == adds_to_some_of_a_scan()

    def test_a_jax_without_the_fault_is_not_yet_the_oldest(self):
        (oldest,) = (
            need.removeprefix("jax>=").split(".")
            for need in tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
            if need.startswith("jax>=")
        )
        assert tuple(map(int, oldest)) < (0, 12), "remove adds_to_some_of_a_scan"
