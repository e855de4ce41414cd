"""Directories of every family: what is read, refused, written, and that `transformers` reads the same."""

import json
import pathlib

import numpy as np
import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from rlhf_jax.data import hf_tokenizer as hf
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.records import Demo, Preference
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from tests.data.families import CHATML, FAMILIES, byte_level

WITH_TEMPLATE = [name for name, family in FAMILIES.items() if family.template]
PLACE = {"source": "f.jsonl", "line": 7}


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def encoder(tokenizer, template):
    return Encoder(tokenizer, template, max_length=500, prompt_length=500, overlong="error")


def words(vocab, specials=(), plain=()):
    """A word-level tokenizer, for counting ids."""
    inner = Inner(models.WordLevel({word: index for index, word in enumerate(vocab)}, unk_token=vocab[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_tokens([AddedToken(t, special=t in specials, normalized=False) for t in (*specials, *plain)])
    return inner


def directory(folder, inner, **files):
    """tokenizer.json and JSON files; `chat_template` is text."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def save(found, folder):
    for name, content in found.items():
        path = pathlib.Path(folder, name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    family = FAMILIES[request.param]
    folder = family.write(tmp_path_factory.mktemp("hf") / "model")
    return family, folder, *hf.read(folder)


def test_control_tokens_of_every_family(opened):
    family, _, tokenizer, template = opened
    assert (tokenizer.end, tokenizer.bos, tokenizer.pad) == (family.end, family.bos, family.pad or family.end)
    assert tokenizer.eos == family.config.get("eos_token", family.end) or tokenizer.eos == family.config["eos_token"]["content"]
    expected = {tokenizer.end_id, tokenizer.eos_id, *family.generation.get("eos_token_id", [])}
    assert set(tokenizer.stop_ids) == expected and tokenizer.stop_ids[0] == tokenizer.end_id
    assert (template is None) == (family.template is None)
    hf.check_fits(tokenizer, {"config.json": family.ids, "generation_config.json": family.generation}, tokenizer.vocab_size + 3, "there")


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_the_mask_is_the_answer_and_its_end(name, tmp_path):
    """One turn, the last of two by a given prompt, and what the prompt of a rollout is."""
    family = FAMILIES[name]
    made = encoder(*hf.read(family.write(tmp_path / "m")))
    end = made.tokenizer.end
    (row,) = made(Demo(messages=(u("question"), a("cat")), **PLACE))
    said = row["tokens"][row["loss_mask"]]
    assert made.tokenizer.decode(said, skip_special=False) == family.said and said[-1] == made.tokenizer.end_id
    pair = Preference(prompt=(u("question"), a("the <s>"), u("the cat")), chosen=(a("cat"),), rejected=(a(f"sat {end} é"),), **PLACE)
    (row,) = made(pair)
    good, bad = (row[f"{branch}_tokens"][row[f"{branch}_mask"]] for branch in ("chosen", "rejected"))
    assert made.tokenizer.decode(good, skip_special=False) == family.said
    assert made.tokenizer.decode(bad, skip_special=False) == family.said.replace("cat", f"sat {end} é")
    assert (good == made.tokenizer.end_id).sum() == (bad == made.tokenizer.end_id).sum() == 1
    first = int(row["chosen_mask"].argmax())
    np.testing.assert_array_equal(row["chosen_tokens"][:first], made.prompt(pair.prompt))


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_every_turn_or_a_clear_refusal(name, tmp_path):
    family = FAMILIES[name]
    made = encoder(*hf.read(family.write(tmp_path / "m")))
    turns = Demo(messages=(u("question"), a("cat"), u("the"), a("cat")), **PLACE)
    if name == "qwen3":  # its earlier answers lose their thoughts
        with pytest.raises(UserError, match=r"^f.jsonl:7 .*rewrites turn 1"):
            list(made(turns))
        (row,) = made(Demo(messages=turns.messages, context=3, **PLACE))
        assert made.tokenizer.decode(row["tokens"][row["loss_mask"]], skip_special=False) == family.said
    else:
        (row,) = made(turns)
        once = made.tokenizer.encode(f"cat{family.end}")[0][-2:]
        assert made.tokenizer.decode(row["tokens"][row["loss_mask"]], skip_special=False).replace(" cat", "cat") == family.said * 2
        assert (row["tokens"][row["loss_mask"]] == once[-1]).sum() == 2
    system = Demo(messages=({"role": "system", "content": "the cat"}, u("question"), a("cat")), **PLACE)
    if family.system:
        (row,) = made(system)
        assert "the cat" in made.tokenizer.decode(row["tokens"])
    else:
        with pytest.raises(UserError, match=r"^f.jsonl:7 config.data.template expected a template that renders.*(System|alternate)"):
            list(made(system))


def test_white_space_that_a_header_swallows_is_not_trained(tmp_path):
    """Phi-3's `<|assistant|>` takes all white space behind it, the answer's too; it is the header all the same."""
    made = encoder(*hf.read(FAMILIES["phi3"].write(tmp_path / "m")))
    (row,) = made(Demo(messages=(u("question"), a("\n cat")), **PLACE))
    assert [made.tokenizer.token(i) for i in row["tokens"][row["loss_mask"]].tolist()] == ["▁cat", "<|end|>"]


def test_tool_calls_and_answers_pass_through(tmp_path):
    made = encoder(*hf.read(FAMILIES["qwen2.5"].write(tmp_path / "m")))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>é"}}}]}
    record = Demo(messages=(u("q"), call, {"role": "tool", "content": "4", "name": "f"}, a("four")), tools=({"name": "f<|im_start|>"},), **PLACE)
    (row,) = made(record)
    text = made.tokenizer.decode(row["tokens"], skip_special=False)
    assert '<tools>{"name":"f<|im_start|>"}</tools>' in text and "<answered>4</answered>" in text
    said = made.tokenizer.decode(row["tokens"][row["loss_mask"]], skip_special=False)
    assert said == '<call>{"name": "f", "arguments": {"x": "<|im_end|>é"}}</call><|im_end|>four<|im_end|>'
    ids = row["tokens"].tolist()  # system, tools, user, call, tool, answer: the strings inside arguments and schemas are none
    assert (ids.count(280), ids.count(281)) == (6, 6)


@pytest.mark.parametrize(("files", "chosen", "text"), [
    ({"tokenizer_config": {"chat_template": "one"}}, None, "one"),
    ({"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]}}, None, "one"),
    ({"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]}}, "tool_use", "two"),
    ({"tokenizer_config": {"chat_template": [{"name": "rag", "template": "two"}]}}, None, "two"),
])
def test_templates_in_the_config(tmp_path, files, chosen, text):
    files["tokenizer_config"]["eos_token"] = "</s>"
    folder = directory(tmp_path / "m", words(["u", "</s>"]), **files)
    assert hf.read(folder, template=chosen)[1].source == text
    with pytest.raises(UserError, match=r"expected a chat template 'tool-use', got none of this name.*(did you mean|legal names)"):
        hf.read(folder, template="tool-use")


def test_template_files_win_over_the_config(tmp_path):
    folder = directory(tmp_path / "m", words(["u", "</s>"]), tokenizer_config={
        "eos_token": "</s>", "chat_template": [{"name": "default", "template": "old"}, {"name": "gone", "template": "old"}]})
    pathlib.Path(folder, "chat_template.jinja").write_text("new")
    pathlib.Path(folder, "additional_chat_templates").mkdir()
    pathlib.Path(folder, "additional_chat_templates", "rag.jinja").write_text("more")
    assert hf.read(folder)[1].source == "new" and hf.read(folder, template="rag")[1].source == "more"
    with pytest.raises(UserError, match="legal names are default, rag"):
        hf.read(folder, template="gone")
    tokenizer, template = hf.read(folder)
    again = save(hf.files(tokenizer, template, model_max_length=9), tmp_path / "n")
    assert hf.read(again)[1].source == "new" and hf.read(again, template="rag")[1].source == "more"


def test_template_names_cannot_leave_the_directory(tmp_path):
    config = {"eos_token": "</s>", "chat_template": [{"name": "default", "template": "x"}, {"name": "../../x", "template": "x"}]}
    with pytest.raises(UserError, match=r"chat_template expected texts under names, got '\.\./\.\./x'"):
        hf.read(directory(tmp_path / "m", words(["u", "</s>"]), tokenizer_config=config))


def test_directories_without_a_fast_tokenizer(tmp_path):
    assert hf.read(str(tmp_path)) == (None, None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected a tokenizer.json, got tokenizer.model alone; .*AutoTokenizer.from_pretrained\('.*'\).save"):
        hf.read(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json expected valid JSON"):
        hf.read(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(UserError, match=r"tokenizer.json expected a tokenizer, got"):
        hf.read(str(tmp_path))


def test_named_tokens_become_special_and_missing_ones_are_added(tmp_path):
    """ids: 0 u, 1 a, 2 <eos> (a plain added token), then <n> of the decoder, <pad>, <img>, <x>."""
    inner = words(["u", "a", "<eos>"], plain=["<eos>"])
    config = {
        "eos_token": "<eos>", "pad_token": {"content": "<pad>", "lstrip": True, "__type": "AddedToken"}, "image_token": "<img>",
        "additional_special_tokens": ["<x>", "<eos>"], "bos_token": None,
        "added_tokens_decoder": {"9": {"content": "<n>", "special": False, "normalized": False}, "2": {"content": "<eos>", "rstrip": True}},
    }
    folder = directory(tmp_path / "m", inner, tokenizer_config=config, special_tokens_map={"bos_token": "a"})
    tokenizer, _ = hf.read(folder)
    assert tokenizer.added == {"<eos>": 2, "<n>": 3, "<pad>": 4, "<img>": 5, "<x>": 6}
    assert list(tokenizer.specials) == ["<eos>", "<pad>", "<img>", "<x>"] and tokenizer.bos is None
    assert tokenizer.encode("a<eos> a")[1].tolist() == [[0, 1], [1, 6], [7, 8]]  # rstrip swallows the space, the offsets do not
    assert tokenizer.variables == {"eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<img>"}
    del config["added_tokens_decoder"]  # now special_tokens_map.json counts
    tokenizer, _ = hf.read(directory(tmp_path / "m", inner, tokenizer_config=config))
    assert (tokenizer.bos, tokenizer.bos_id) == ("a", 1) and tokenizer.added["a"] == 1


def test_tokens_that_only_the_models_config_names(tmp_path):
    inner = words(["u", "a", "<e>"], specials=["<e>"])
    folder = directory(tmp_path / "m", inner, config={"bos_token_id": 1, "text_config": {"eos_token_id": [2, 1]}, "pad_token_id": -1})
    tokenizer, _ = hf.read(folder)
    assert (tokenizer.end, tokenizer.bos, tokenizer.pad) == ("<e>", None, "<e>")  # 1 is a word, not a control token
    assert tokenizer.stop_ids == (2, 1)
    with pytest.raises(UserError, match=r"tokenizer_config.json eos_token expected a token, got none"):
        hf.read(directory(tmp_path / "n", inner))
    with pytest.raises(UserError, match=r"the model's eos_token_id expected an id or a list of ids, got '2'"):
        hf.read(directory(tmp_path / "o", inner, config={"eos_token_id": "2"}))


def test_the_end_of_a_turn_may_be_flagged_as_ordinary(tmp_path):
    inner = words(["u", "a", "</s>", "<im_end>"], specials=["</s>"], plain=["<im_end>"])
    template = "{% for m in messages %}{{ m.content + ' <im_end>\\n' }}{% endfor %}"
    tokenizer, layout = hf.read(directory(tmp_path / "m", inner, tokenizer_config={"eos_token": "</s>", "chat_template": template}))
    assert (tokenizer.end, tokenizer.eos, tokenizer.stop_ids) == ("<im_end>", "</s>", (3, 2))
    row = next(encoder(tokenizer, layout)(Demo(messages=(u("u"), a("a")), **PLACE)))
    assert (row["tokens"].tolist(), row["loss_mask"].tolist()) == ([0, 3, 1, 3], [False, False, True, True])
    with pytest.raises(UserError, match=r"^f.jsonl:7 a message expected text, got '<im_end>', which this tokenizer cannot write as text"):
        next(encoder(tokenizer, layout)(Demo(messages=(u("a <im_end>"), a("a")), **PLACE)))  # it is a word of the vocabulary


def test_another_template_brings_its_own_end(tmp_path):
    tokenizer, _ = hf.read(FAMILIES["qwen2.5-base"].write(tmp_path / "m"))
    roles = ChatTemplate.load("roles", variables=tokenizer.variables)
    with pytest.raises(UserError, match=r"expected every answer to end with <\|im_end\|>"):
        encoder(tokenizer, roles)
    found = hf.fitted(tokenizer, roles)
    assert (found.end, found.eos, found.stop_ids) == ("<|endoftext|>", "<|endoftext|>", (279, 281))
    (row,) = encoder(found, roles)(Demo(messages=(u("the"), a(" cat ")), **PLACE))
    assert found.decode(row["tokens"], skip_special=False) == "User: the\n\nAssistant: cat<|endoftext|>"
    assert found.decode(row["tokens"][row["loss_mask"]], skip_special=False) == " cat<|endoftext|>"
    assert hf.fitted(found, roles) is found


def test_templates_whose_control_tokens_the_tokenizer_lacks(tmp_path):
    tokenizer, _ = hf.read(FAMILIES["gpt2"].write(tmp_path / "m"))
    for name in ("plain", "lines"):
        with pytest.raises(UserError, match=rf"config\.data\.template = '{name}' writes '<\|bos\|>', which is no token.*'roles'.*add_tokens"):
            encoder(tokenizer, ChatTemplate.load(name))
    with pytest.raises(UserError, match=r"= 'template' writes '<\|im_end\|>', which is no token"):
        encoder(tokenizer, ChatTemplate(FAMILIES["qwen2.5"].template))
    plain = ChatTemplate.load("plain")
    names = ["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    fitting = hf.fitted(hf.add_tokens(tokenizer, names).tokenizer, plain)
    (row,) = encoder(fitting, plain)(Demo(messages=(u("cat"), a("the")), **PLACE))
    cat, the = (fitting.encode(word)[0][0] for word in ("cat", "the"))
    assert row["tokens"].tolist() == [280, 282, cat, 284, 283, the, 284]


def test_added_tokens_come_behind_the_highest_id(tmp_path):
    tokenizer, template = hf.read(FAMILIES["llama3"].write(tmp_path / "m"))
    found = hf.add_tokens(tokenizer, ("<|pad|>", "<|eot|>", "<tool>"))
    assert (found.new, found.existing) == (("<|pad|>", "<tool>"), ("<|eot|>",))
    assert found.tokenizer.vocab_size == tokenizer.vocab_size + 2 == 287
    assert found.tokenizer.encode("<tool>the<|pad|>")[0].tolist() == [286, tokenizer.encode("the")[0][0], 285]
    assert (found.tokenizer.end, found.tokenizer.stop_ids) == (tokenizer.end, tokenizer.stop_ids)
    (row,) = encoder(found.tokenizer, template)(Demo(messages=(u("<tool>"), a("cat")), **PLACE))
    assert 286 not in row["tokens"]  # a control token now, which users cannot type
    for wrong in ([""], ["<a>", "<a>"], [3]):
        with pytest.raises(UserError, match=r"config\.model\.add_tokens expected different texts, got"):
            hf.add_tokens(tokenizer, wrong)
    holes = Inner(models.WordLevel({"u": 0, "a": 7}, unk_token="u"))
    holes.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match=r"expected a tokenizer without holes in its ids, got one where '<b>' would be"):
        hf.add_tokens(Tokenizer(holes, pad="</s>", bos=None, end="</s>"), ["<b>"])


@pytest.mark.parametrize(("ids", "size", "message"), [
    ({}, 281, r"^there: the tokenizer's token '<\|im_end\|>' has id 281, and the model's vocab_size is 281; .*--config\.model\.add_tokens"),
    ({"eos_token_id": 2}, 300, r"^there/config.json eos_token_id = 2 is '#', and the tokenizer's eos_token is '<\|im_end\|>' = 281; correct"),
    ({"eos_token_id": 290}, 300, r"eos_token_id = 290 names no token of the tokenizer, which has 282 \(the model's vocab_size is 300\)"),
    ({"eos_token_id": [281, 5000]}, 300, r"eos_token_id = 5000 names no token"),
    ({"pad_token_id": 0}, 300, r"pad_token_id = 0 is '!', and the tokenizer's pad_token is '<\|endoftext\|>' = 279"),
    ({"text_config": {"pad_token_id": 0}}, 300, r"pad_token_id = 0 is '!'"),
])
def test_a_tokenizer_that_is_not_the_models(tmp_path, ids, size, message):
    family = FAMILIES["qwen2.5"]
    tokenizer, _ = hf.read(family.write(tmp_path / "m"))
    with pytest.raises(UserError, match=message):
        hf.check_fits(tokenizer, {"config.json": ids}, size, "there")
    hf.check_fits(tokenizer, {"config.json": {"eos_token_id": [281, 279], "bos_token_id": 279, "pad_token_id": None}}, 282, "there")
    with pytest.raises(UserError, match=r"generation_config.json bos_token_id = 5 is '&', and the tokenizer's bos_token is '<\|begin\|>' = 279"):
        hf.check_fits(hf.read(FAMILIES["llama3"].write(tmp_path / "n"))[0], {"generation_config.json": {"bos_token_id": 5}}, 285, "there")


def test_export_and_import_are_the_same(opened, tmp_path):
    family, _, tokenizer, template = opened
    tokenizer.config["some_key"] = {"kept": [1, "é"]}
    found = hf.files(tokenizer, template, model_max_length=77)
    config = json.loads(found["tokenizer_config.json"])
    assert (config["model_max_length"], config["tokenizer_class"], config["some_key"]) == (77, "PreTrainedTokenizerFast", {"kept": [1, "é"]})
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert config.get("chat_template") == found.get("chat_template.jinja") == family.template
    folder = pathlib.Path(save(found, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.stop_ids)}))
    again, layout = hf.read(str(folder))
    assert again.digest == tokenizer.digest and again.stop_ids == tokenizer.stop_ids
    assert (layout.source if layout else None) == family.template
    del tokenizer.config["some_key"]


def test_our_own_runs_remember_where_a_tokenizer_came_from(opened, tmp_path):
    _, _, tokenizer, _ = opened
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path, **json.loads(json.dumps(tokenizer.control_tokens)))
    assert (again.digest, again.stop_ids, again.config, again.bos) == (tokenizer.digest, tokenizer.stop_ids, tokenizer.config, tokenizer.bos)


def test_documents_are_read_by_the_post_processor(opened):
    family, _, tokenizer, _ = opened
    for text in ("the cat", f"the{family.end} cat", ""):
        assert tokenizer.encode_document(text).tolist() == family.inner.encode(text).ids
    first = {"llama3": "<|begin|>", "mistral": "<s>"}
    if FAMILIES.get("llama3") is family:
        assert tokenizer.token(int(tokenizer.encode_document("the")[0])) == first["llama3"]


# --- against transformers itself ---

TEXTS = ["the cat sat", " the  cat\n\nsat", "é ☃ 日本", "", "<s>the</s> cat<|im_end|>x <|end|> the"]
TALK = [u("the question"), a("the  answer é"), u("cat?")]


def theirs(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def same(ours, layout, folder):
    """ids of documents, texts and ids of conversations, and texts of ids."""
    their = theirs(folder)
    assert (their.eos_token, their.bos_token) == (ours.eos, ours.bos) and len(their) <= ours.vocab_size
    for text in TEXTS:
        ids = their(text).input_ids
        assert ours.encode_document(text).tolist() == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == their.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    if layout is not None and "strftime_now" not in layout.source:
        for talk, more in ((TALK, {"add_generation_prompt": True}), (TALK[:2], {})):
            assert layout.text(talk, **more) == their.apply_chat_template(talk, tokenize=False, **more)
            ids = their.apply_chat_template(talk, return_dict=True, **more)["input_ids"]
            assert ours.encode(layout.text(talk, **more))[0].tolist() == ids
        hf_mask = their.apply_chat_template(TALK[:2], return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
        if layout.shipped:
            assert encoder(ours, layout).conversation(tuple(TALK[:2]))[1].tolist() == [bool(x) for x in hf_mask]


def test_transformers_reads_the_same_directory(opened):
    _, folder, tokenizer, template = opened
    same(tokenizer, template, folder)


def test_transformers_reads_our_export(opened, tmp_path):
    _, _, tokenizer, template = opened
    added = hf.add_tokens(tokenizer, ["<new>"]).tokenizer
    for number, found in enumerate((tokenizer, added)):
        same(found, template, save(hf.files(found, template, model_max_length=50), tmp_path / str(number)))


@pytest.mark.parametrize("name", ["plain", "lines", "roles"])
@pytest.mark.parametrize("made", [Tokenizer.byte_level(), Tokenizer.train_bpe(["the cat sat"] * 9, 290)], ids=["byte", "bpe"])
def test_transformers_reads_our_own(name, made, tmp_path):
    layout = ChatTemplate.load(name, variables=made.variables)
    same(made, layout, save(hf.files(made, layout, model_max_length=50), tmp_path / "m"))


def test_transformers_agrees_on_odd_names(tmp_path):
    """The directory of `test_named_tokens_become_special_and_missing_ones_are_added`, both ways."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<img>",
        "additional_special_tokens": ["<x>", "<eos>"], "bos_token": None,
        "added_tokens_decoder": {"9": {"content": "<n>", "special": False, "normalized": False}, "2": {"content": "<eos>", "rstrip": True}},
    }
    for decoder in (True, False):
        if not decoder:
            del config["added_tokens_decoder"]
        inner = words(["u", "a", "<eos>"], plain=["<eos>"])
        folder = directory(tmp_path / "m", inner, tokenizer_config=config, special_tokens_map={"bos_token": "a"})
        their, (ours, _) = theirs(folder), hf.read(folder)
        assert {token.content: index for index, token in their.added_tokens_decoder.items()} == ours.added
        assert {token.content for token in their.added_tokens_decoder.values() if token.special} == set(ours.specials)
        assert their.special_tokens_map == ours.variables and their.bos_token == ours.bos


def test_a_class_that_rebuilds_the_tokenizer_agrees(tmp_path):
    """LlamaTokenizer makes its own Metaspace from the vocabulary; where tokenizer.json says the same, so do we."""
    family = FAMILIES["mistral"]
    config = {**family.config, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    folder = directory(tmp_path / "m", family.inner, tokenizer_config=config, config={"model_type": "llama"})
    their = theirs(folder)
    assert type(their).__name__ == "LlamaTokenizer"
    ours, _ = hf.read(folder)
    for text in TEXTS:
        assert ours.encode_document(text).tolist() == their(text).input_ids
    exported = save(hf.files(ours, None, model_max_length=50), tmp_path / "n")
    pathlib.Path(exported, "config.json").write_text(json.dumps({"model_type": "llama"}))
    for text in TEXTS:
        assert theirs(exported)(text).input_ids == ours.encode_document(text).tolist()


def test_chatml_fixture_is_what_the_counts_say():
    assert [byte_level(CHATML).token_to_id(token) for token in CHATML] == [279, 280, 281]
