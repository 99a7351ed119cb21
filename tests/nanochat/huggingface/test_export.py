"""An export is what it was made from, and nothing is left of one that is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.data.conversations import Conversation, Message, Part
from nanochat.huggingface import compare, export
from nanochat.huggingface.compare import CONVERSATIONS, TRANSFORMERS
from nanochat.huggingface.config import RMS_NORM_EPS, ExportError, require_expressible
from nanochat.huggingface.export import CARD, RECORD, export_model, read_export
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE, GUARD, TOKENIZER
from nanochat.huggingface.weights import converted
from nanochat.inference.sampling import Sampling
from nanochat.model.gpt import GPT, NORM_EPS
from nanochat.recipe_book import RecipeBook
from nanochat.recipes import SPECIAL_TOKENS, Model, quick
from nanochat.store.digests import digest_file
from nanochat.store.receipts import current_receipt

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine
    from nanochat.store import ObjectStore
    from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Any:
    """The tokenizer, as `transformers` loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported)


def rendered(loaded: Any, *messages: dict[str, Any], prompt: bool = True) -> list[int]:
    ids = loaded.apply_chat_template(list(messages), add_generation_prompt=prompt, return_dict=True)
    return list(ids["input_ids"])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# --------------------------------------------------------------------------------------------------
# What is in the folder


def test_the_folder_holds_what_transformers_reads_a_card_and_a_record(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        CHAT_TEMPLATE,
        CARD,
        RECORD,
    }


def test_the_config_says_what_is_wrong_by_default(exported: Path, byte_tokenizer: Tokenizer) -> None:
    config = json.loads((exported / "config.json").read_text())
    end = byte_tokenizer.special("<|assistant_end|>")
    assert config["rms_norm_eps"] == RMS_NORM_EPS == NORM_EPS == pytest.approx(1.1920929e-07, rel=1e-9)
    assert config["intermediate_size"] == 4 * 48
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config["final_logit_softcapping"] == 15.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (byte_tokenizer.bos, end)
    assert config["pad_token_id"] == byte_tokenizer.bos
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, byte_tokenizer.bos]


def test_the_record_says_from_which_receipt_it_came_and_what_was_compared(
    exported: Path, exported_store: ObjectStore
) -> None:
    record = read_export(exported)
    receipt = current_receipt(exported_store, "quick", "sft")
    assert receipt is not None
    assert (record.model, record.stage, record.receipt_sha256) == ("quick", "sft", receipt.digest())
    assert record.compared["texts"] == 9
    assert record.compared["logits"] >= 12
    assert record.compared["generated_tokens"] > 100
    assert {file.name for file in record.files} == {path.name for path in exported.iterdir()} - {RECORD, CARD}


def test_weights_are_fp32_and_all_of_them(exported: Path, trained_model: GPT) -> None:
    tensors = load_file(exported / "model.safetensors")
    assert len(tensors) == 6 * 2 + 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        parameter.numel() for parameter in trained_model.parameters()
    )


# --------------------------------------------------------------------------------------------------
# The tokenizer and its template


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_conversation_has_our_ids(loaded: Any, engine: Engine, conversation: Conversation) -> None:
    messages = conversation.to_json()["messages"]
    assert rendered(loaded, *messages) == engine.tokenizer.render_prompt(conversation)


def test_a_whole_conversation_has_our_ids(loaded: Any, engine: Engine) -> None:
    parts = (Part("python", "1+1"), Part("python_output", "2"), Part("text", "Two."))
    conversation = Conversation((Message("user", "1+1?"), Message("assistant", parts)))
    messages = conversation.to_json()["messages"]
    assert rendered(loaded, *messages, prompt=False) == engine.tokenizer.render(conversation).ids


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_a_special_token_that_a_user_types_stays_text(loaded: Any, engine: Engine, name: str) -> None:
    special = engine.tokenizer.special(name)
    for text in (name, f"<{name}", f"{name[:5]}{GUARD}{name[5:]}", f"{name[:1]}{GUARD}{name[1:]}", name * 2):
        ids = rendered(loaded, user(text))
        assert ids.count(special) == rendered(loaded, user("x")).count(special), text
        plain = text.replace(GUARD, "")
        assert ids == engine.tokenizer.render_prompt(Conversation((Message("user", plain),)))


def test_parts_do_not_make_a_special_token_together(loaded: Any, engine: Engine) -> None:
    parts = [{"type": "text", "text": "<"}, {"type": "text", "text": "|user_end|>"}]
    assert rendered(loaded, {"role": "user", "content": parts}) == rendered(loaded, user("<|user_end|>"))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ([{"role": "assistant", "content": "x"}], "role assistant where user is due"),
        ([user("a"), user("b")], "role user where assistant is due"),
        ([user("a"), {"role": "assistant", "content": None}], "has no text"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}], "a part of type python"),
    ],
)
def test_what_cannot_be_rendered_is_refused(loaded: Any, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(Exception, match=says):
        rendered(loaded, *messages)


def test_text_that_is_no_chat_begins_with_bos(loaded: Any, engine: Engine) -> None:
    assert loaded("Once upon").input_ids == [engine.tokenizer.bos, *engine.tokenizer.encode("Once upon")]


# --------------------------------------------------------------------------------------------------
# Answers


def test_transformers_gives_the_engine_s_answer(exported: Path, loaded: Any, engine: Engine) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = loaded.apply_chat_template(
        [user("What is your name?")], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**ids, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
    assert loaded.decode(generated, skip_special_tokens=True) == "I am NanoChat 😀."
    (ours,) = engine.generate([ids["input_ids"][0].tolist()], Sampling(max_tokens=40))
    assert [*ours.ids, ours.stop_id] == generated.tolist()


def test_a_base_model_is_exported_without_a_chat_template(
    exported_store: ObjectStore, tmp_path: Path, byte_tokenizer: Tokenizer
) -> None:
    export_model(exported_store, "quick", "base", tmp_path / "base")
    assert not (tmp_path / "base" / CHAT_TEMPLATE).exists()
    assert json.loads((tmp_path / "base" / "config.json").read_text())["eos_token_id"] == byte_tokenizer.bos
    assert "not trained to chat" in (tmp_path / "base" / CARD).read_text()


def test_rows_that_only_pad_the_vocabulary_are_left_out(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    from standins.trained_model import fill_store

    padded = GPT(Model(depth=1, width=16, heads=2, kv_heads=2, context=32), byte_tokenizer.vocab_size + 49)
    padded.init_weights(0)
    torch.nn.init.normal_(padded.lm_head.weight)
    store = fill_store(tmp_path, padded.eval(), byte_tokenizer)
    export_model(store, "quick", "sft", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors["lm_head.weight"]) == byte_tokenizer.vocab_size


# --------------------------------------------------------------------------------------------------
# Refusals


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterModel:
    """What a recipe's model may have some day."""

    depth: int = 2
    window: int | None = None
    value_embeddings: bool = False


def test_fields_that_cannot_be_expressed_are_named() -> None:
    require_expressible(quick().model)
    require_expressible(LaterModel())  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"model.window = 512, model.value_embeddings = True"):
        require_expressible(LaterModel(window=512, value_embeddings=True))  # type: ignore[arg-type]


def test_tensors_without_a_place_are_named(trained_model: GPT) -> None:
    tensors = {**trained_model.state_dict(), "value_embeds.0.weight": torch.zeros(1)}
    with pytest.raises(ExportError, match=r"no place for value_embeds\.0\.weight"):
        converted(tensors, 271)
    with pytest.raises(ExportError, match=r"no place for blocks\.0\.attn\.c_gate"):
        converted({"blocks.0.attn.c_gate.weight": torch.zeros(1)}, 271)


def damaged(folder: Path, part: str) -> None:
    """One thing in a written export is not the model's any more."""
    config = json.loads((folder / "config.json").read_text())
    if part == "eps":
        config["rms_norm_eps"] = 1e-6
    elif part == "theta":
        config["rope_parameters"]["rope_theta"] = 20_000.0
    elif part == "softcap":
        config["final_logit_softcapping"] = 16.0
    elif part == "mlp":
        config["intermediate_size"] = 8192
    elif part == "eos":
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 1}))
    elif part in ("weight", "tensor"):
        tensors = load_file(folder / "model.safetensors")
        if part == "weight":
            tensors["lm_head.weight"][5, 7] += 1e-3
        else:
            del tensors["model.layers.1.mlp.fc2.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif part == "template":
        path = folder / CHAT_TEMPLATE
        path.write_text(path.read_text().replace(r"replace('<|', '<\ufdd0|')", "string"))
    elif part == "merge":
        document = json.loads((folder / TOKENIZER).read_text())
        del document["model"]["merges"][2], document["pre_tokenizer"]["pretokenizers"][0]
        (folder / TOKENIZER).write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("eps", "logits after a prompt"),
        ("theta", "logits after a prompt"),
        ("softcap", "logits after a prompt"),
        ("mlp", "cannot load the export"),
        ("weight", "logits after a prompt"),
        ("tensor", "model.layers.1.mlp.fc2.weight"),
        ("eos", "goes on after token"),
        ("template", "has the ids"),
        ("merge", "has the ids"),
    ],
)
def test_an_export_that_differs_is_refused_and_nothing_is_left(
    exported_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, says: str
) -> None:
    real = compare.compare

    def compare_damaged(folder: Path, engine: Engine, *, chat: bool) -> compare.Compared:
        damaged(folder, part)
        return real(folder, engine, chat=chat)

    monkeypatch.setattr(compare, "compare", compare_damaged)
    with pytest.raises(ExportError, match=says):
        export_model(exported_store, "quick", "sft", tmp_path / "out" / "quick")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_export_leaves_the_one_before(
    exported: Path, exported_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quick"
    shutil.copytree(exported, folder)
    monkeypatch.setattr(export, "model_config", lambda *_args, **_kwargs: {})
    with pytest.raises(ExportError, match="cannot load the export"):
        export_model(exported_store, "quick", "sft", folder)
    assert read_export(folder) == read_export(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]


def test_an_earlier_export_is_replaced_and_other_folders_are_not(
    exported: Path, exported_store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "quick"
    shutil.copytree(exported, folder)
    export_model(exported_store, "quick", "base", folder)
    assert read_export(folder).stage == "base"
    assert not (folder / CHAT_TEMPLATE).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(ExportError, match="is there already"):
            export_model(exported_store, "quick", "sft", taken)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not delete"


def test_a_model_whose_recipe_is_not_here_is_refused(
    exported_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_recipes", lambda: RecipeBook(recipes={}, errors=()))
    with pytest.raises(ExportError, match="unknown model 'quick'"):
        export_model(exported_store, "quick", "sft", tmp_path / "out")


def test_a_changed_file_of_an_export_is_named(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    shutil.copytree(exported, folder)
    (folder / CARD).write_text("people may edit the card")
    read_export(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config.json is not what was exported: export quick anew"):
        read_export(folder)
    (folder / RECORD).unlink()
    with pytest.raises(ExportError, match="is no finished export"):
        read_export(folder)


@pytest.mark.parametrize("missing", ["no module", "no NanoChat"])
def test_without_transformers_it_says_how_to_get_it(
    exported_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    older = type(sys)("transformers")
    monkeypatch.setitem(sys.modules, "transformers", None if missing == "no module" else older)
    with pytest.raises(ExportError, match=r"install it with `pip install 'transformers>=5\.17'`") as raised:
        export_model(exported_store, "quick", "sft", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_the_remedy_names_what_the_project_depends_on() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["export"] == [TRANSFORMERS]


def test_two_exports_of_one_model_are_the_same(
    exported: Path, exported_store: ObjectStore, tmp_path: Path
) -> None:
    export_model(exported_store, "quick", "sft", tmp_path / "again")
    digests = {path.name: digest_file(path) for path in exported.iterdir()}
    assert {path.name: digest_file(path) for path in (tmp_path / "again").iterdir()} == digests
