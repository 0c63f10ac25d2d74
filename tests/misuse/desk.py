"""What lies on the user's desk: models, caches, query files, notes; made once, never changed."""

import json
import os
import shutil
import sys
from pathlib import Path

from broken_files import QUERY_FILES, YAML_FILES
from cases import BUILD, EVAL

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_tiny_model

ESCAPES = "red\x1b[31m\u202ename"


def queries(word: str, count: int = 6) -> str:
    """Return the lines of a sound query file."""
    rows = [{"query": f"Who keeps {word} {i}?", "answer": f"Orn {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def lay_out(desk: Path, call) -> dict[str, str]:
    """Fill an empty folder; return what each name in a case stands for.

    Args:
        desk: The folder, which is the current one of every command.
        call: Runs a command that has to succeed.
    """
    names = "notes home tmp queries yaml unfinished/shards own_student fake_student cut_cache"
    for name in (*names.split(), "results"):
        (desk / name).mkdir(parents=True)
    places = {path.name: str(path) for path in desk.iterdir()}
    texts = {
        "notes/thesis.txt": "mine\n",
        "home/.profile": "mine\n",
        "notes/README.md": "# mine\n",
        "notes/.notes.tmp": "mine\n",
        "own_student/duet_run.json": "{}",
        "own_student/draft.md": "mine\n",
        "fake_student/duet_run.json": "{}",
        "forget.jsonl": queries("lanterns"),
        "retain.jsonl": queries("rivers"),
        "many.jsonl": queries("towers", 400),
        "empty": "",
    }
    for name, text in texts.items():
        (desk / name).write_text(text)
        places[Path(name).stem] = str(desk / name)
    for folder, files in (("queries", QUERY_FILES), ("yaml", YAML_FILES)):
        for name, content in files.items():
            (desk / folder / name).write_bytes(content)
    (desk / "dangling").symlink_to(desk / "gone")
    (desk / "loop").symlink_to(desk / "loop")
    places |= {name: str(desk / name) for name in ("dangling", "loop")}
    places |= {"long": "x" * 300, "escapes": ESCAPES, "other": str(desk / "other")}
    places |= {"model": str(desk / "model")}
    call(lambda: _models(desk))
    for name in _BAD_MODELS:
        places[name] = str(desk / name)
    for name, model in (("cache", "model"), ("other_cache", "other")):
        places[name] = str(desk / name)
        call(BUILD.replace("{model}", f"{{{model}}}").replace("{new}", places[name]), places)
    call(f"{EVAL} --out {desk}/results/eval.json", places)
    places["pinned_wrongly"] = f"{places['cache']}@sha256:{'0' * 64}"
    _bad_caches(desk)
    return places


def _models(desk: Path) -> None:
    model = make_tiny_model(desk / "model")
    make_tiny_model(desk / "other", seed=1, vocab_size=400)
    for name, damage in _BAD_MODELS.items():
        damage(shutil.copytree(model, desk / name))


def _change_config(**changes: object):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    # What a malicious checkpoint does: it leaves a file when it is unpickled.
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")


def _remote_code(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("open('executed', 'w')\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_x.X")
    _change_config(model_type="x-model", auto_map=auto)(folder)


_BAD_MODELS = {
    "cut_model": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "bad_config": lambda folder: (folder / "config.json").write_text('{"model_type": "llama",'),
    "unknown_kind": _change_config(model_type="nosuch"),
    "pickled": _pickle,
    "remote_code": _remote_code,
}


def _bad_caches(desk: Path) -> None:
    shutil.copytree(desk / "cache", desk / "cut_cache", dirs_exist_ok=True)
    shutil.copytree(desk / "cache/shards", desk / "unfinished/shards", dirs_exist_ok=True)
    shard = next((desk / "cut_cache/shards").iterdir())
    os.truncate(shard, shard.stat().st_size // 2)
