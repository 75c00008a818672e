"""What `--check-data` says of the data is what a run would find, and it trains nothing."""

import json
import re
from argparse import Namespace

import pytest
from test_chat_loader import make_conversations
from test_chat_scripts import write_conversations, write_too_long
from test_scripts import assert_refused, save_random_model, working_in

from nanochat.checkpoint import find_checkpoint, load_tokenizer, read_meta
from nanochat.common import UserError
from nanochat.data.chat_loader import pack_conversations
from nanochat.training import rl
from nanochat.training.check_data import check_data
from tasks.common import TaskMixture
from tasks.mixtures import SFT_MIXTURES, Corpus, Sources

BAD = [{"text": "Hi"}, [{"role": "user", "content": "Hi"}]]


@pytest.fixture
def own(base_folder, tmp_path):
    """Conversations of which some do not fit the context of 64 tokens of the random model there is."""
    save_random_model(base_folder, "mid", meta={})
    write_too_long(tmp_path / "long.jsonl")
    long = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    write_conversations(tmp_path / "own.jsonl", [*make_conversations(40), *long])
    return tmp_path / "own.jsonl"


def check(*names, skip_bad_rows=0, more=None, **options):
    args = Namespace(source="mid", model_tag="", step=None, skip_bad_rows=skip_bad_rows)
    check_data(args, Sources([str(name) for name in names], SFT_MIXTURES, more or Corpus([], [])), **options)


def test_files_are_measured_as_a_run_packs_them(own, capsys):
    check(own)
    found = capsys.readouterr().out
    folder = find_checkpoint("mid")
    [file] = Sources([str(own)], {}).own_files
    rows = pack_conversations(file, load_tokenizer(folder, read_meta(folder)), 64)
    assert f"{own}: 42 OpenAI conversations\n" in found
    assert f"    {rows.num_targets:,} of {rows.num_tokens:,} tokens are learned" in found
    assert int(re.search(r"the longest conversation has ([\d,]+)", found)[1].replace(",", "")) > 500
    assert f"too long for the context: {rows.num_cut} cut after an answer, {rows.num_left_out} left out" in found
    assert rows.num_left_out == 2
    assert found.endswith("the data are in order\n")


def test_without_a_model_the_rows_are_still_checked(tmp_path, capsys):
    write_conversations(tmp_path / "own.jsonl", make_conversations(5))
    check(tmp_path / "own.jsonl")
    found = capsys.readouterr().out
    assert "tokens are not counted: no mid checkpoint" in found
    assert "own.jsonl: 5 OpenAI conversations\n" in found


def test_every_refused_row_is_listed_before_the_refusal(own, tmp_path, capsys):
    write_conversations(tmp_path / "bad.jsonl", [*make_conversations(3), *BAD])
    with pytest.raises(UserError, match=r"2 of 47 rows cannot .*bad.jsonl, line 4: .*--skip-bad-rows 2"):
        check(own, tmp_path / "bad.jsonl", "small_world")
    found = capsys.readouterr().out
    assert "    refused, line 4: a conversation must have messages" in found
    assert "    refused, line 5: the last message must be the assistant's" in found
    assert "SmallWorld: 5,000 conversations" in found
    check(tmp_path / "bad.jsonl", skip_bad_rows=2)
    assert capsys.readouterr().out.endswith("the data are in order\n")


def test_questions_of_reinforcement_learning_are_measured_without_their_reference(own, capsys):
    check(own, reply_tokens=16)
    found = capsys.readouterr().out
    folder = find_checkpoint("mid")
    task = TaskMixture(Sources([str(own)], {}).own_files)
    questions = rl.Questions(task, load_tokenizer(folder, read_meta(folder)), 48)
    assert "    questions of " in found
    assert f"; {questions.num_left_out} have more than 48 and are left out" in found


@pytest.mark.parametrize("stage", ["mid_train", "chat_sft", "chat_rl"])
def test_the_command_ends_with_2_for_refused_rows_and_0_for_none(tmp_path, stage):
    write_conversations(tmp_path / "good.jsonl", make_conversations(3))
    write_conversations(tmp_path / "bad.jsonl", [*make_conversations(3), *BAD])
    with working_in(tmp_path) as place:
        save_random_model(place.base, {"mid_train": "base", "chat_sft": "mid", "chat_rl": "sft"}[stage], meta={})
        before = sorted(place.base.rglob("*"))
        assert "the data are in order" in place.run_well(f"scripts.{stage}", "--check-data", "--data", "good.jsonl")
        ended = place.run(f"scripts.{stage}", "--check-data", "--data", "bad.jsonl")
        assert "refused, line 5" in ended.stdout
        assert_refused(ended, "bad.jsonl, line 4", "bad.jsonl, line 5", "--skip-bad-rows 2")
        assert_refused(place.run(f"scripts.{stage}", "--data", "bad.jsonl"), "bad.jsonl, line 4", "--check-data")
        assert sorted(place.base.rglob("*")) == before
