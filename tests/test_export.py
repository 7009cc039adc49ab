"""`tptrain export` and `train.init_from` as commands: from a folder of transformers through a split training to another one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tests.checkpoint.hugging_face.models import VOCAB, on_command_line, tensors_of, their_model
from tests.command import command
from tests.support import SMALL

TEXT = "".join(f"def f{i}(x):\n    return {i} * x\n\n" for i in range(200))
PLAIN = [argument for argument in SMALL if not argument.startswith(("data=", "data.", "model.", "train.eval"))]
DATA = ["data=text", "data.path=text.txt", "data.seq_len=16", "data.val_fraction=0", "data.store_dir=stores"]
SHORT = ["train.eval_steps=0", "train.sample_tokens=0", "checkpoint.every=0"]


def test_from_their_folder_to_ours_and_back(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "text.txt").write_text(TEXT)
    theirs = their_model("gpt2", True, spread=0.03)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    common = [*PLAIN, *DATA, *SHORT, *on_command_line("gpt2", True), "train.init_from=theirs", "optimizer.lr=0"]
    split = ["parallel.tp=2", "parallel.pp=2"]

    wrong = command(tmp_path, *common, "model.vocab_size=300", "hydra.run.dir=run")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("tptrain: train.init_from=theirs holds another model: transformer.wte.weight is [259, 32], and this model ")
    assert wrong.err.count("\n") == 1

    first = command(tmp_path, *common, *split, "train.max_steps=1", "hydra.run.dir=run")
    assert first.code == 0, first.err
    out = command(tmp_path, "export", "run=run", "to=again", "max_shard_bytes=30000")
    assert (out.code, out.out) == (0, "again\n"), out.err
    assert out.err.startswith("tptrain: ")
    assert out.err.count("\n") == 1
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "theirs"), "a learning rate of 0 changes nothing"
    assert not (tmp_path / "again/tokenizer.json").exists()
    card = (tmp_path / "again/README.md").read_text()
    assert "Ids are the bytes of UTF-8 text; 256 begins and ends a document. Ids from 257 to 258 are never used." in card
    assert f"{sum(p.numel() for p in theirs.parameters()):,} parameters" in card
    config = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert (config.eos_token_id, config.bos_token_id, config.vocab_size) == (256, 256, VOCAB)

    # Its verdict is not asked for: the key biases' gradients are rounding alone, and with such weights above its limit.
    command(tmp_path, "check", *common, "parallel.tp=2", "check.steps=1", "hydra.run.dir=checked")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    checked = json.loads((tmp_path / "checked/check.json").read_text())["one_process"]["loss"][0]
    assert math.isclose(checked, losses[0], rel_tol=1e-5), "the check too starts from the folder"

    (tmp_path / "theirs").rename(tmp_path / "gone")
    again = command(tmp_path, *common, "train.max_steps=2", "hydra.run.dir=run")
    assert again.code == 0, again.err  # a resumed run needs the folder no more
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()


def test_a_run_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    import transformers

    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = ["data.tokenizer.name=train", f"data.tokenizer.vocab_size={VOCAB}"]
    run = command(tmp_path, *PLAIN, *DATA, *SHORT, *on_command_line("llama", False), *tokenizer, "train.max_steps=2", "hydra.run.dir=run")
    assert run.code == 0, run.err
    out = command(tmp_path, "export", "run=run", "to=new/model", "checkpoint=step-00000002")
    assert (out.code, out.out) == (0, "new/model\n"), out.err
    folder = tmp_path / "new/model"
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]

    plain = Tokenizer.from_file(str(tmp_path / "run/tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids = loaded("def f(", add_special_tokens=False).input_ids
    assert ids == plain.encode("def f(", add_special_tokens=False).ids
    assert loaded.decode(ids) == "def f("
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.eos_token_id == loaded.eos_token_id == plain.token_to_id("<|endoftext|>")
    written = command(tmp_path, "generate", "run=run", "prompt=def f(", "temperature=0", "max_new_tokens=6", "hardware=cpu")
    assert written.code == 0, written.err
    with torch.no_grad():
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    assert loaded.decode(theirs, skip_special_tokens=True) + "\n" == written.out, "greedy text is the same in both"

    full = command(tmp_path, "export", "run=run", "to=new/model")
    assert (full.code, full.out) == (2, "")
    assert full.err.startswith("tptrain: to=new/model is not empty: use")
