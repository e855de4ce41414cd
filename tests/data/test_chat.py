import time

import pytest

from rlhf_jax.data import chat
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.errors import UserError

TURNS = (
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "r"},
    {"role": "user", "content": "p"},
    {"role": "assistant", "content": ""},
)
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def spoken(template, messages, **options):
    text, spans = template.render(messages, **options)
    return text, [text[s:e] for s, e in spans]


def test_plain():
    text, said = spoken(ChatTemplate.load("plain"), TURNS)
    assert text == "<|bos|><|system|>s<|end|><|user|>q<|end|><|assistant|>r<|end|><|user|>p<|end|><|assistant|><|end|>"
    assert said == ["r<|end|>", "<|end|>"]


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_the_generation_prompt_is_the_header_of_an_answer(name):
    template = ChatTemplate.load(name)
    prompt, said = spoken(template, TURNS[:2], add_generation_prompt=True)
    full, _ = template.render(TURNS[:3])
    assert said == [] and full.startswith(prompt) and full[len(prompt) :].startswith("r<|end|>")


def test_without_generation_blocks_prefix_differences_are_used():
    marked = CHATML.replace("{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}",
        "{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\\n' }}",
    )
    assert spoken(ChatTemplate(CHATML), TURNS) == spoken(ChatTemplate(marked), TURNS)
    assert spoken(ChatTemplate(CHATML), TURNS)[1] == ["r<|end|>", "<|end|>"]


def test_a_commented_generation_block_is_none():
    assert spoken(ChatTemplate("{# {% generation %} #}" + CHATML), TURNS)[1] == ["r<|end|>", "<|end|>"]


def test_generation_inside_a_macro_and_a_captured_block():
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}!{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% set turn %}[{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.content }}{% endif %}]{% endset %}"
        "{{ turn }}{% endfor %}"
    )
    assert spoken(ChatTemplate(source), TURNS) == ("[s][q][r!][p][!]", ["r!", "!"])


def test_a_template_that_rewrites_turns_is_refused():
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"rewrites turn 2; put \{% generation %\}"):
        ChatTemplate(source).render(TURNS)


def test_variables_and_files(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ bos_token }}{{ messages | tojson }}")
    template = ChatTemplate.load(str(tmp_path / "t.jinja"), variables={"bos_token": "B"})
    assert template.render([{"role": "user", "content": "<é>"}])[0] == 'B[{"role": "user", "content": "<é>"}]'
    assert template.digest != ChatTemplate.load(str(tmp_path / "t.jinja")).digest


def test_unknown_templates():
    with pytest.raises(UserError, match=r"config\.data\.template expected a shipped template or a file, got 'plane'.*did you mean 'plain'"):
        ChatTemplate.load("plane")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 'a' * 10**9 }}", "needed more than 512 MiB"),
        ("{{ 'a'.ljust(10**10) }}", "needed more than 512 MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "wrote more than 4194304 characters"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
    ],
)
def test_templates_that_fail_say_why(source, reason):
    with pytest.raises(UserError, match=reason) as caught:
        ChatTemplate(source, name="mine").render(TURNS)
    assert str(caught.value).startswith("config.data.template expected a template that renders the conversation, got 'mine': ")


def test_an_endless_template_is_stopped_and_the_next_rendering_works():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate("{% if messages | length > 1 %}" + loops + "{% endif %}x")
    start = time.monotonic()
    with pytest.raises(UserError, match="took more than 5 s"):
        template._marked(TURNS, False)
    assert time.monotonic() - start < 8
    assert template._marked(TURNS[:1], False)[0] == "x"


def test_all_templates_share_a_process_and_what_ends_it_ends_no_other_template(monkeypatch):
    started, original = [], chat.subprocess.Popen
    monkeypatch.setattr(chat, "_shared", [])
    monkeypatch.setattr(chat.subprocess, "Popen", lambda *a, **k: started.append(original(*a, **k)) or started[-1])
    templates = [ChatTemplate(f"{n}{{% generation %}}{{{{ messages[0].content }}}}{{% endgeneration %}}") for n in range(5)]
    wrong, plain = ChatTemplate("{% if %}"), ChatTemplate(CHATML)
    for _ in range(2):
        assert [spoken(template, TURNS[:1]) for template in templates] == [(f"{n}s", ["s"]) for n in range(5)]
        with pytest.raises(UserError, match="TemplateSyntaxError"):
            wrong.render(TURNS)
        assert spoken(plain, TURNS)[1] == ["r<|end|>", "<|end|>"]
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
    assert templates[3].text(TURNS) == "3s" and len(started) == 2
    monkeypatch.setattr(chat, "TEMPLATES", 2)
    assert [template.text(TURNS) for template in templates] == [f"{n}s" for n in range(5)] and len(started) == 4
    assert [process.poll() is None for process in started] == [False, False, False, True]


def test_an_interrupted_rendering_leaves_no_answer_for_the_next_one(monkeypatch):
    first, second = ChatTemplate("first"), ChatTemplate("second")
    assert (first.text(TURNS), second.text(TURNS)) == ("first", "second")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat._Worker, "_line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.text(TURNS)
    assert (second.text(TURNS), first.text(TURNS)) == ("second", "first")


def test_no_clock_runs_on_behind_a_refusal(monkeypatch):
    """What refuses is answered at once; the alarm that would have ended it may not end the process under the next template."""
    compiled, rung = {}, []
    monkeypatch.setattr(chat.template_worker.signal, "alarm", rung.append)
    for question in ('{"template": 0, "source": "{% if %}"}', '{"template": 0, "source": "x"}', '{"template": 0, "variables": {}}', "nonsense"):
        chat.template_worker._answer(question, compiled)
    assert rung == [chat.template_worker.SECONDS + 1, 0] * 4


def test_user_text_cannot_fake_the_marks_or_run_as_a_template():
    odd = "".join(map(chr, (0x10F000, 0x10F001))) + "{{ 7 * 7 }}{% generation %}"
    messages = ({"role": "user", "content": odd}, {"role": "assistant", "content": "r"})
    assert spoken(ChatTemplate.load("plain"), messages) == (f"<|bos|><|user|>{odd}<|end|><|assistant|>r<|end|>", ["r<|end|>"])


# --- what templates of other makers expect of their surroundings ---


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': 'é<', 'a': [1]} | tojson }}", '{"b": "é<", "a": [1]}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}", '{"a":1,"b":"\\u00e9"}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%d %b %Y %H') }}", "26 Jul 2024 00"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}", "q"),
        ("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "6"),
        ("{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }} {{ bos_token is defined }}", "True True False False"),
        ("{{ dict(a=1).a }}{{ messages[0].get('x', 'none') }}{{ '  a ' | trim | upper }}", "1noneA"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
    ],
)
def test_the_surroundings_of_a_template(source, text):
    template = ChatTemplate(source, variables={"bos_token": None})
    assert template.text(TURNS) == text and template.text(TURNS) == text


@pytest.mark.parametrize("source", ["{% set ns = namespace(_x=1) %}", "{% set ns = namespace() %}{% set ns.__html__ = 1 %}{{ ns }}"])
def test_a_namespace_takes_no_name_of_pythons(source):
    with pytest.raises(UserError, match="may not begin with an underscore"):
        ChatTemplate(source).text(TURNS)


def test_variables_tools_and_empty_fields():
    template = ChatTemplate("{{ tools[0].name }} {{ on }} {{ 'tool_calls' in messages[0] }} {{ messages[0].name }}", variables={"on": False})
    message = {"role": "user", "content": "q", "tool_calls": None, "name": "n"}
    assert template.text([message], tools=[{"name": "f"}]) == "f False False n"


DROPS = (  # an earlier answer loses what the last one shows, as with Qwen3
    "{% for m in messages %}[{% if m.role == 'assistant' and loop.last %}thought {% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[{% endif %}"
)


def test_turns_of_the_context_may_be_rewritten():
    with pytest.raises(UserError, match="rewrites turn 2"):
        ChatTemplate(DROPS).render(TURNS)
    text, spans = ChatTemplate(DROPS).render(TURNS, context=4, end="<|end|>")
    assert [text[s:e] for s, e in spans] == ["thought <|end|>"]


def test_what_stands_behind_the_end_token_is_not_said():
    """Phi-3 closes a conversation with an end of document, and a marked block may hold the line break."""
    source = CHATML + "{% if not add_generation_prompt %}<|eod|>{% endif %}"
    text, spans = ChatTemplate(source).render(TURNS, end="<|end|>")
    assert [text[s:e] for s, e in spans] == ["r<|end|>", "<|end|>"] and text.endswith("<|end|>\n<|eod|>")
    with pytest.raises(UserError, match="rewrites turn 2"):
        ChatTemplate(source).render(TURNS)
    marked = ChatTemplate("{% for m in messages %}{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}{% endfor %}")
    text, spans = marked.render(TURNS[:1], end="<|end|>")
    assert [text[s:e] for s, e in spans] == ["s<|end|>"]


def test_roles_needs_no_control_tokens():
    template = ChatTemplate.load("roles", variables={"eos_token": "</s>"})
    assert spoken(template, TURNS) == ("System: s\n\nUser: q\n\nAssistant: r</s>\n\nUser: p\n\nAssistant: </s>", [" r</s>", " </s>"])
    prompt = template.text(TURNS[:2], add_generation_prompt=True)
    assert prompt == "System: s\n\nUser: q\n\nAssistant:"
    assert ChatTemplate.load("roles", variables={"eos_token": "</s>", "bos_token": "<s>"}).text(TURNS[:1]) == "<s>System: s"
    assert template.text([{"role": "tool", "content": " 4 "}]) == "Tool: 4"


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_a_role_without_a_control_token_is_refused(name):
    with pytest.raises(UserError, match=r"role tool has no control token here; choose a template that knows it"):
        ChatTemplate.load(name).render([{"role": "tool", "content": "4"}])
