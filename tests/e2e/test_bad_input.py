"""Every mistake gives one message that names it, its own exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from suasion.core.manifest import alone_in
from tests.e2e.commands import TINY, Commands, lines, read
from tests.unit.data.dumps import TAIL, answer, question, threads, write_posts

CONFIG, DATA, MODEL, REWARD, DISK, CHECK = 2, 3, 4, 5, 7, 8
PPO = shlex.split(
    "--steps 1 --batch_size 4 --mini_batch_size 2 --response.max_tokens 8 --samples 0 --threads 1"
)

BAD_REWARDS = {
    "nan": "[float('nan') for _ in responses]",
    "short": "[1.0]",
    "words": "['good' for _ in responses]",
    "nothing": "None",
    "raises": "[1 / 0 for _ in responses]",
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing must be written."""
    return tmp_path / "out"


# --- dumps


def test_a_dump_cut_off(suasion: Commands, tmp_path: Path, out: Path) -> None:
    """Names file and line."""
    dump = write_posts(tmp_path / "site", threads(3), tail='  <row Id="99" PostTypeI')
    message = suasion.refused(DATA, "prepare", "stackexchange", dump, "--out", out)
    assert "Posts.xml, line 12" in message
    assert not out.exists()


def test_a_row_without_id(suasion: Commands, tmp_path: Path, out: Path) -> None:
    """Names file, line and attribute."""
    row = '  <row PostTypeId="1" Score="0" Title="Why?" Body="So." />\n'
    dump = write_posts(tmp_path / "site", [*threads(2), row])
    message = suasion.refused(DATA, "prepare", "stackexchange", dump, "--out", out)
    assert "Posts.xml, line 9" in message
    assert "has no Id" in message
    assert not out.exists()


def test_a_dump_without_two_answers_to_anything(
    suasion: Commands, tmp_path: Path, out: Path
) -> None:
    """There is nothing to prefer."""
    rows = [row for q in range(1, 90, 2) for row in (question(q), answer(q + 1, q))]
    dump = write_posts(tmp_path / "site", rows)
    message = suasion.refused(DATA, "prepare", "stackexchange", dump, "--out", out)
    assert "pair" in message
    assert not out.exists()


@pytest.mark.parametrize("content", ["", "<posts>\n" + TAIL])
def test_an_empty_dump(suasion: Commands, tmp_path: Path, out: Path, content: str) -> None:
    """An empty file, and a file without rows."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "Posts.xml").write_text(content, "utf-8")
    suasion.refused(DATA, "prepare", "stackexchange", tmp_path / "site", "--out", out)
    assert not out.exists()


def test_a_dump_that_is_not_there(suasion: Commands, tmp_path: Path, out: Path) -> None:
    """Neither the folder nor, in a folder, the file."""
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        message = suasion.refused(DATA, "prepare", "stackexchange", folder, "--out", out)
        assert str(folder) in message
    assert not out.exists()


# --- recipes and options


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("ppo: {kl: {coeff: 0.1}}", ["ppo.kl.coeff: unknown key; did you mean coef?"]),
        ("rewrad: {}", ["rewrad: unknown key; did you mean reward?"]),
        ("sft: {block: many}", ["sft.block", "integer", "'many'"]),
        ("sft: [1, 2]", ["sft"]),
        (
            "sft: {epochs: -1, blok: 3}\nppo: {clip: x}",
            ["3 mistakes", "sft.epochs", "sft.blok", "did you mean block?", "ppo.clip"],
        ),
        ("sft: {data: d}", ["nothing gives sft.model"]),
        ("sft: {", ["line"]),
        ("", ["mapping"]),
    ],
)
def test_a_recipe_with_mistakes(
    suasion: Commands, tmp_path: Path, out: Path, recipe: str, said: list[str]
) -> None:
    """All at once, each with its path and the nearest name."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: n\nout: {out}\n{recipe}\n" if recipe else "", "utf-8")
    message = suasion.refused(CONFIG, "run", path)
    assert all(words in message for words in said), message
    assert str(path) in message or "nothing gives" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demmo"], "did you mean demo?"),
        (["frobnicate"], "commands: demo"),
        (["run", "nowhere.yaml"], "no such recipe: nowhere.yaml"),
        (["prepare", "reddit", "x"], "unknown kind of source"),
        (["sft", "--learning_rat", "1"], "did you mean learning_rate?"),
        (["sft", "--learning_rat", "1"], "out: missing"),
        (["sft", "--block"], "--block needs a value"),
        (["sft", "block", "3"], "unexpected argument 'block'"),
        (["sft", "--model", "m", "--data", "d"], "out: missing"),
        (["sft", "--out", "o"], "needs --model, --data"),
        (["sft", "--out", "o", "--threads", "0"], "threads: Input should be greater than 0"),
        (["sft", "--out", "o", "--seed", "-1"], "seed: Input should be greater"),
        (["demo", "--ppo.kl.coeff", "1"], "did you mean coef?"),
        (["generate", "--model", "m"], "either --prompt or --data"),
        (["report", ".", "--title", "x"], "no option --title"),
    ],
)
def test_a_command_line_with_mistakes(
    suasion: Commands, tmp_path: Path, words: list[str], said: str
) -> None:
    """Names what is wrong and the nearest thing that is right."""
    assert said in suasion.refused(CONFIG, *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_inputs_are_looked_for_before_the_first_stage(
    suasion: Commands, demo: Path, tmp_path: Path, out: Path
) -> None:
    """Of all stages at once, but for what a stage of the run will make."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: n\nout: {out}\nsft: {{model: {demo}/pretrain/model, data: {demo}/prepare}}\n"
        f"ppo: {{reward: {demo}/reward/modell, data: prompts.jsonl}}\n",
        "utf-8",
    )
    message = suasion.refused(MODEL, "run", path)
    assert f"ppo.reward: no such model folder: {demo}/reward/modell" in message
    assert "ppo.data: no such file or folder: prompts.jsonl" in message
    assert "ppo.model" not in message
    assert not out.exists()


def test_a_folder_that_another_process_writes(suasion: Commands, demo: Path, out: Path) -> None:
    """Refused until that one is done, or gone."""
    command = ("sft", "--model", demo / "pretrain/model", "--data", demo / "prepare", "--out", out)
    out.mkdir()
    with alone_in(out):
        assert f"{out} is being written by another process" in suasion.refused(CONFIG, *command)
    suasion.done(*command, "--max_steps", "1")


# --- models


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(demo / "sft" / "model", tmp_path / "model")


def damage_tokenizer(model: Path) -> None:
    """No tokenizer."""
    for path in model.glob("token*"):
        path.unlink()


@pytest.mark.parametrize("template", ["no fields", "{response} before {query}"])
def test_a_template_without_its_fields(suasion: Commands, demo: Path, template: str) -> None:
    """Query and response, in this order."""
    options = ("--model", demo / "sft/model", "--prompt", "Hi", "--template", template)
    assert "must name {query}" in suasion.refused(CONFIG, "generate", *options)


def damage_eos(model: Path) -> None:
    """A tokenizer that cannot end a text."""
    settings = read(model / "tokenizer_config.json")
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def damage_tail(model: Path) -> None:
    """Weights cut off."""
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


DAMAGES = {
    "no tokenizer": damage_tokenizer,
    "no EOS token": damage_eos,
    "model.safetensors": lambda model: (model / "model.safetensors").unlink(),
    "weights are damaged": damage_tail,
    "valid JSON": lambda model: (model / "config.json").write_text("{", "utf-8"),
    "no config.json": lambda model: (model / "config.json").unlink(),
    "was trained with the template": lambda model: (model / "suasion.json").write_text(
        '{"template": "{query} {response}"}', "utf-8"
    ),
}


@pytest.mark.parametrize("command", ["sft", "ppo", "generate"])
@pytest.mark.parametrize("said", DAMAGES)
def test_a_model_folder_that_cannot_be_used(
    suasion: Commands, demo: Path, model: Path, out: Path, said: str, command: str
) -> None:
    """Says which, and what is wrong with it."""
    DAMAGES[said](model)
    data = ("--data", demo / "prepare", "--out", out)
    more = ("--reward", demo / "reward/model") if command == "ppo" else ()
    message = suasion.refused(MODEL, command, "--model", model, *data, *more)
    assert said in message, message
    assert str(model) in message
    assert not out.exists()


def test_weights_that_lack_a_layer(suasion: Commands, model: Path) -> None:
    """They would be drawn at random, so they are refused."""
    config = read(model / "config.json")
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    message = suasion.refused(MODEL, "generate", "--model", model, "--prompt", "Hi")
    assert "weights are not in the folder" in message


def test_a_language_model_as_reward(suasion: Commands, demo: Path, out: Path) -> None:
    """It has no scoring head."""
    model = demo / "sft/model"
    inputs = ("--model", model, "--reward", model, "--data", demo / "prepare", "--out", out)
    assert "score" in suasion.refused(MODEL, "ppo", *inputs, *PPO)
    assert not out.exists()


@pytest.mark.parametrize("path", ["./nowhere", "{demo}/sft/modell"])
def test_a_model_folder_that_is_not_there(
    suasion: Commands, demo: Path, out: Path, path: str
) -> None:
    """A path is not taken for a name on the Hub."""
    path = path.format(demo=demo)
    message = suasion.refused(
        MODEL, "sft", "--model", path, "--data", demo / "prepare", "--out", out
    )
    assert f"no such model folder: {path}" in message
    assert not out.exists()


# --- lengths


@pytest.mark.parametrize("command", ["ppo", "generate"])
def test_a_prompt_longer_than_the_context(
    suasion: Commands, demo: Path, tmp_path: Path, out: Path, command: str
) -> None:
    """Names the row; with `too_long` it is cut or left out instead."""
    table = tmp_path / "long.jsonl"
    rows = [{"query": "Short?"}, {"query": "Why is it so long? " * 200}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    inputs = ("--model", demo / "sft/model", "--data", table, "--response.max_tokens", "8")
    more = ("--reward", demo / "reward/model", *PPO) if command == "ppo" else ()
    message = suasion.refused(DATA, command, *inputs, *more, "--out", out)
    assert f"{table}, row 1: the prompt has" in message
    assert not out.exists()
    for rule in ("cut", "drop"):
        target = tmp_path / rule
        suasion.done(command, *inputs, *more, "--too_long", rule, "--out", target)
        if command == "generate":
            assert len(lines(target)) == {"cut": 2, "drop": 1}[rule]


@pytest.mark.parametrize("command", ["ppo", "generate"])
def test_a_response_longer_than_the_context(
    suasion: Commands, demo: Path, out: Path, command: str
) -> None:
    """There is no room for any prompt."""
    inputs = ("--model", demo / "sft/model", "--data", demo / "prepare", "--out", out)
    more = ("--reward", demo / "reward/model", *PPO) if command == "ppo" else ()
    message = suasion.refused(CONFIG, command, *inputs, *more, "--response.max_tokens", 256)
    assert "leaves no room for a prompt in a context of 256" in message
    assert not out.exists()


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_block_longer_than_the_context(
    suasion: Commands, demo: Path, out: Path, stage: str
) -> None:
    """Positions do not reach that far."""
    source = "--text" if stage == "pretrain" else "--data"
    inputs = ("--model", demo / "pretrain/model", source, demo / "prepare", "--out", out)
    message = suasion.refused(CONFIG, stage, *inputs, "--block", 512)
    assert "block 512 is longer than the model's context of 256" in message
    assert not out.exists()


def test_a_text_that_fills_no_block(suasion: Commands, tmp_path: Path, out: Path) -> None:
    """Says how many tokens there are."""
    (tmp_path / "little.txt").write_text("A few words.", "utf-8")
    message = suasion.refused(DATA, "pretrain", "--text", tmp_path / "little.txt", "--out", out)
    assert "do not fill one block" in message


# --- tables


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"query": "Why?", "respones": "So."}', "did you mean 'respones'"),
        ('{"query": "Why?", "response": 3}', "column 'response'"),
        ('{"query": "Why?", "response"', "line 2"),
        ('["Why?"]', "line 2"),
    ],
)
def test_a_table_with_a_bad_row(
    suasion: Commands, demo: Path, tmp_path: Path, out: Path, row: str, said: str
) -> None:
    """Names file, line and column."""
    table = tmp_path / "rows.jsonl"
    table.write_text('{"query": "Why?", "response": "So."}\n' + row + "\n", "utf-8")
    inputs = ("--model", demo / "pretrain/model", "--data", table, "--out", out)
    message = suasion.refused(DATA, "sft", *inputs)
    assert str(table) in message
    assert said in message
    assert not out.exists()


# --- rewards


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "returned nan for response 0"),
        ("short", "returned 1 scores for"),
        ("words", "must return one number per response"),
        ("nothing", "must return one number per response"),
        ("raises", "bad.py, line 8: ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_function_that_misbehaves(
    suasion: Commands, demo: Path, tmp_path: Path, out: Path, name: str, said: str
) -> None:
    """Named, with the line it failed at if it did."""
    head = "def {}(queries, responses): return (\n {})\n"
    code = "".join(head.format(*item) for item in BAD_REWARDS.items())
    (tmp_path / "bad.py").write_text(code, "utf-8")
    inputs = ("--model", demo / "sft/model", "--data", demo / "prepare", "--out", out)
    line = code.splitlines().index(f" {BAD_REWARDS[name]})") + 1
    command = ("ppo", *inputs, "--reward", f"{tmp_path / 'bad.py'}:{name}", *PPO)
    for checks, exit_code in (("stop", CHECK), ("off", REWARD)):
        message = suasion.refused(exit_code, *command, "--checks", checks)
        assert said.replace("line 8", f"line {line}") in message
        assert not out.exists() or "model" not in {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("nowhere.py:score", "no such file: nowhere.py"),
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("bad.py:nothing_like_it", "has no function 'nothing_like_it'"),
        ("broken.py:score", "broken.py, line 2: SyntaxError"),
        ("raising.py:score", "raising.py, line 1: ZeroDivisionError"),
    ],
)
def test_a_reward_function_that_is_not_there(
    suasion: Commands, demo: Path, tmp_path: Path, reward: str, said: str
) -> None:
    """Or whose file cannot be imported."""
    (tmp_path / "bad.py").write_text("", "utf-8")
    (tmp_path / "broken.py").write_text("x = 1\ndef (\n", "utf-8")
    (tmp_path / "raising.py").write_text("x = 1 / 0\n", "utf-8")
    inputs = ("--model", demo / "sft/model", "--data", demo / "prepare", "--out", "out")
    message = suasion.refused(CONFIG, "ppo", *inputs, "--reward", reward, *PPO, cwd=tmp_path)
    assert said in message
    assert not (tmp_path / "out").exists()


# --- where to write


def test_a_folder_of_someone_else(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """Files that no stage wrote are never deleted, whatever their names."""
    for name in ("notes.txt", "manifest.json", "begun.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"name": "mine"}', "utf-8")
        message = suasion.refused(
            CONFIG, "prepare", "stackexchange", demo / "dump", "--out", folder
        )
        assert f"{folder} holds files that suasion did not write" in message
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_folder_that_holds_the_input(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """Running would delete what it is about to read."""
    model = shutil.copytree(demo / "sft", tmp_path / "sft") / "model"
    inputs = ("--model", model, "--data", demo / "prepare")
    for out in (model.parent, model / "inside", demo / "prepare"):
        suasion.refused(CONFIG, "sft", *inputs, "--out", out)
    message = suasion.refused(CONFIG, "reward", *inputs, "--out", demo / "ppo")
    assert "holds the stage ppo" in message
    assert (model / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["sft", "demo"])
def test_a_folder_that_cannot_be_written(
    suasion: Commands, demo: Path, tmp_path: Path, command: str
) -> None:
    """A file is in the way."""
    (tmp_path / "file").write_text("mine", "utf-8")
    inputs = ("--model", demo / "pretrain/model", "--data", demo / "prepare")
    options = inputs if command == "sft" else ("--questions", 10)
    message = suasion.refused(DISK, command, *options, "--out", tmp_path / "file" / "out")
    assert str(tmp_path / "file") in message


def test_a_recipe_of_nothing(suasion: Commands, tmp_path: Path) -> None:
    """Is no run, and makes no folder."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: nothing\n", "utf-8")
    message = suasion.refused(CONFIG, "run", recipe, "--out", tmp_path / "run")
    assert "names no stage" in message
    assert not (tmp_path / "run").exists()


def test_a_typo_loses_no_finished_stage(suasion: Commands, demo: Path, tmp_path: Path) -> None:
    """What was made before waits until the new inputs have proven good."""
    out = shutil.copytree(demo, tmp_path / "run")
    before = read(out / "ppo" / "manifest.json")
    suasion.refused(DATA, "demo", "--out", out, *TINY, "--ppo.data", tmp_path / "typo.jsonl")
    assert read(out / "ppo" / "manifest.json") == before
    assert not (out / "ppo.before").exists()
    assert "ppo  already done" in suasion.done("demo", "--out", out, *TINY)


LARGEST = {
    "prepare": 8_000,
    "pretrain": 60_000,
    "sft": 100_000,
    "reward": 100_000,
    "ppo": 200_000,
    "evaluate": 500,
}
"""Bytes after which the disk is full: too few for the checkpoints or results of the stage."""


@pytest.mark.parametrize("stage", LARGEST)
def test_a_full_disk(suasion: Commands, demo: Path, tmp_path: Path, stage: str) -> None:
    """Says so; with space again the same command goes on, and nobody can tell afterwards."""
    out = shutil.copytree(demo, tmp_path / "run")
    shutil.rmtree(out / stage)
    command = ("demo", "--out", out, *TINY)
    message = suasion.refused(DISK, *command, largest_file=LARGEST[stage])
    assert "cannot write" in message
    assert not (out / stage / "manifest.json").exists()
    assert not list(out.rglob("*.partial"))
    suasion.done(*command)
    for weights in (demo / stage).rglob("*.safetensors"):
        assert (out / weights.relative_to(demo)).read_bytes() == weights.read_bytes()
