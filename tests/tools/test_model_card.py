"""What `enc ckpt export` writes and does beside the weights: the card, replacing, the hub."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import Enc
from safetensors.torch import load_file

from enc.encoder.errors import RunError, UsageError
from enc.tools.export import export_checkpoint
from enc.tools.hub import hub_of, push

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture
def evaluated_run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run that was evaluated twice up to step 6 and tested, below the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "runs" / "my")
    metrics = tmp_path / "runs" / "my" / "metrics.jsonl"
    records = [{"step": step, "eval_loss": 7.5 - step, "eval_loss_bits": 1.5, "eval_accuracy": 0.25,
                "eval_perplexity": 1234.5} for step in (3, 6, 9)]  # fmt: skip
    records.append({"step": 6, "test_step": 6, "test_loss": 2.125, "test_accuracy": 0.5})
    metrics.write_text(metrics.read_text() + "".join(json.dumps(record) + "\n" for record in records))
    return Path("runs/my")


def test_the_card_says_what_the_run_was(evaluated_run: Path) -> None:
    """Hyperparameters, data, hardware, versions, each evaluation up to the step, and the test, with their units."""
    out = export_checkpoint(evaluated_run / "checkpoints" / "6", None, "fp32").folder
    card = (out / "README.md").read_text()
    for text in (
        "`transformers>=4.57`",
        "| Rows a step | 4 |",
        "| Tokens a step | 256 |",
        "| Predicted tokens | 15% |",
        "| Optimizer | adamw, betas (0.9, 0.999), eps 1e-08, weight decay 0.01 |",
        "| Learning rate | 0.001 |",
        "| Mixed precision | no |",
        "| Seed | 1 |",
        "| Dataset | python-docs |",
        "| Tokenizer | wordpiece-1024, 1,024 tokens |",
        "| Hardware | 1 x CPU",
        "| `torch` | ",
        "nats a predicted token |",
        "| Step | Loss (nats a predicted token) | Loss (bits a predicted token) | Accuracy of predicted tokens |",
        "| 3 | 4.5 | 1.5 | 0.25 | 1234 |",
        "| 6 | 1.5 | 1.5 | 0.25 | 1234 |",
        "## Test of the final weights",
        "| Loss (nats a predicted token) | 2.125 |",
    ):
        assert text in card, f"{text!r} is not in\n{card}"
    assert "| 9 |" not in card
    assert re.search(r"\| Train split \| [\d,]+ documents, [\d,]+ tokens \|", card)
    assert "| None" not in card
    assert str(Path.cwd()) not in card


def test_the_snippets_of_the_card_run_as_pasted(evaluated_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the export was made; guesses are printed with their probability, and texts become vectors."""
    out = export_checkpoint(evaluated_run / "checkpoints" / "6", None, "fp32").folder
    snippets = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert len(re.findall(r"^0\.\d{3}  \S", capsys.readouterr().out, flags=re.MULTILINE)) == 5
    assert scope["vectors"].shape == (2, 64)
    assert len(snippets) == 2


def test_an_export_is_replaced_when_asked_and_nothing_else_is(finished_run: Path, tmp_path: Path) -> None:
    """Without force it says how; with it the new one takes the place, also of nothing; other folders stay."""
    first, last = (finished_run / "checkpoints" / step for step in ("3", "6"))
    out = export_checkpoint(first, tmp_path / "out", "fp32", force=True).folder
    before = load_file(out / "model.safetensors")["model.encoder.weight"]
    with pytest.raises(UsageError, match="--force"):
        export_checkpoint(last, out, "fp32")
    export_checkpoint(last, out, "fp32", force=True)
    assert (load_file(out / "model.safetensors")["model.encoder.weight"] != before).any()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == ["out"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(UsageError, match="not empty"):
        export_checkpoint(last, tmp_path / "home", "fp32", force=True)
    assert (tmp_path / "home" / "precious").exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the hub's client was asked, none of which leaves this machine."""
    asked: list[tuple] = []
    for name in ("whoami", "create_repo", "upload_folder"):
        answer = SimpleNamespace(commit_url="https://hub/commit")

        def record(_self, *args, _name=name, _answer=answer, **options):
            asked.append((_name, args, options))
            return _answer

        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", record)
    return asked


def test_a_folder_is_pushed_as_one_commit(asked: list[tuple], tmp_path: Path) -> None:
    """Who we are is asked first; the repository is made as private as it is meant."""
    assert push(hub_of("me/model"), tmp_path, "me/model", private=True) == "https://hub/commit"
    assert [name for name, _, _ in asked] == ["whoami", "create_repo", "upload_folder"]
    assert asked[1][1:] == (("me/model",), {"private": True, "exist_ok": True})
    assert asked[2][2]["repo_id"] == "me/model"
    assert asked[2][2]["folder_path"] == tmp_path


def test_trouble_with_the_hub_is_a_sentence(asked: list[tuple], tmp_path: Path, monkeypatch) -> None:
    """A bad name and a missing login before anything is exported; afterwards what to type."""
    with pytest.raises(UsageError, match="Nothing was exported"):
        hub_of("a/b/c")

    def refuse(*_args, **_options):
        raise ConnectionError("no network\nand more")

    api = hub_of("me/model")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    with pytest.raises(RunError, match=r"no network\. Repeat with `hf upload me/model"):
        push(api, tmp_path, "me/model", private=False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse)
    with pytest.raises(UsageError, match="hf auth login"):
        hub_of("me/model")


def test_the_command_asks_the_hub_before_it_exports(enc: Enc, finished_run: Path) -> None:
    """Offline it ends with a sentence and leaves nothing."""
    done = enc("ckpt", "export", str(finished_run), "--out", "out", "--push-to-hub", "me/model", code=2)
    assert "--push-to-hub me/model" in done.stderr
    assert not (enc.folder / "out").exists()
