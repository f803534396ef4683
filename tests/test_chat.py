import datetime
import json

import chat_formats
import pytest

from roe_jax.completion import Completion
from roe_jax.text import template_process
from roe_jax.text.chat import Chat, check_messages, load_template
from roe_jax.text.tokenizer import Tokenizer

SYSTEM = {"role": "system", "content": "Be <brief> & übergenau."}
USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "It is 2."}
AGAIN = {"role": "user", "content": " 2 + 2? "}
CHATS = {
  "one": [USER],
  "three": [USER, ASSISTANT, AGAIN],
  "system": [SYSTEM, USER],
  "prefilled": [USER, {"role": "assistant", "content": "It is\n"}],
}
DATE = "2025-01-31"


def load(name, folder, template=None, files=None, **settings):
  chat_formats.write(folder, name, template, **(files or {}))
  return Chat.load(folder, Tokenizer.load(folder), **settings)


HARMONY_SYSTEM = (
  "<|start|>system<|message|>Current date: 2025-01-31\n\nReasoning: {}\n\n"
  "# Valid channels: analysis, commentary, final.<|end|>"
)
RENDERED = [
  ("olmoe", "one", {}, "<|endoftext|><|user|>\n1 + 1?\n<|assistant|>\n"),
  (
    "olmoe",
    "three",
    {},
    "<|endoftext|><|user|>\n1 + 1?\n<|assistant|>\nIt is 2.<|endoftext|>\n"
    "<|user|>\n 2 + 2? \n<|assistant|>\n",
  ),
  (
    "olmoe",
    "system",
    {},
    "<|endoftext|><|system|>\nBe <brief> & übergenau.\n<|user|>\n1 + 1?\n<|assistant|>\n",
  ),
  ("olmoe", "prefilled", {}, "<|endoftext|><|user|>\n1 + 1?\n<|assistant|>\nIt is\n"),
  ("mixtral", "three", {}, "<s> [INST] 1 + 1? [/INST] It is 2.</s> [INST]  2 + 2?  [/INST]"),
  ("mixtral", "prefilled", {}, "<s> [INST] 1 + 1? [/INST] It is"),
  (
    "harmony",
    "one",
    {"date": DATE},
    HARMONY_SYSTEM.format("medium") + "<|start|>user<|message|>1 + 1?<|end|><|start|>assistant",
  ),
  (
    "harmony",
    "system",
    {"date": DATE, "reasoning_effort": "low"},
    HARMONY_SYSTEM.format("low")
    + "<|start|>developer<|message|># Instructions\n\nBe <brief> & übergenau.<|end|>"
    "<|start|>user<|message|>1 + 1?<|end|><|start|>assistant",
  ),
  (
    "harmony",
    "prefilled",
    {"date": DATE},
    HARMONY_SYSTEM.format("medium") + "<|start|>user<|message|>1 + 1?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is\n",
  ),
  (
    "chatml",
    "system",
    {},
    "<|im_start|>system\nBe <brief> & übergenau.<|im_end|>\n"
    "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n",
  ),
  ("thinking", "one", {}, "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"),
  (
    "thinking",
    "one",
    {"enable_thinking": True},
    "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n",
  ),
  (
    "thinking",
    "one",
    {"enable_thinking": False},
    "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
  ),
  (
    "deepseek",
    "three",
    {},
    "<｜begin▁of▁sentence｜>User: 1 + 1?\n\nAssistant: It is 2.<｜end▁of▁sentence｜>"
    "User:  2 + 2? \n\nAssistant:",
  ),
  ("r1", "one", {}, "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜><think>\n"),
  (
    "ling",
    "system",
    {"enable_thinking": True},
    "<role>SYSTEM</role>Be <brief> & übergenau.\ndetailed thinking on<|role_end|>"
    "<role>HUMAN</role>1 + 1?<|role_end|><role>ASSISTANT</role>",
  ),
]


@pytest.mark.parametrize("name, messages, settings, expected", RENDERED)
def test_messages_are_rendered_in_the_models_format(name, messages, settings, expected, tmp_path):
  chat = load(name, tmp_path, **settings)
  assert chat.render(CHATS[messages]) == expected
  tokens = chat.prompt(CHATS[messages]).tokens
  tokenizer = Tokenizer.load(tmp_path)
  assert tokenizer.decode(tokens, skip_special_tokens=False) == expected
  marks = [mark for mark in chat_formats.SPECIAL[name] if mark in expected]
  assert {tokenizer.added_id(mark) for mark in marks} <= set(tokens)


SETTINGS = {"harmony": {"reasoning_effort": "high"}, "thinking": {"enable_thinking": False}}


@pytest.mark.parametrize(
  "name, messages",
  [
    (name, messages)
    for name in chat_formats.TEMPLATES
    for messages in CHATS
    if (name, messages) != ("mixtral", "system")
  ],
)
def test_prompts_are_those_of_transformers(name, messages, tmp_path):
  transformers = pytest.importorskip("transformers")
  settings = SETTINGS.get(name, {})
  chat = load(name, tmp_path, **settings, date=DATE if name == "harmony" else None)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  if name == "harmony":  # they know today only
    theirs.chat_template = theirs.chat_template.replace('strftime_now("%Y-%m-%d")', f'"{DATE}"')
  messages = CHATS[messages]
  kind = (
    "continue_final_message" if messages[-1]["role"] == "assistant" else "add_generation_prompt"
  )
  apply = lambda **kind: theirs.apply_chat_template(messages, **kind, **settings)
  assert chat.render(messages) == apply(tokenize=False, **{kind: True})
  assert chat.prompt(messages).tokens == apply(return_dict=False, **{kind: True})


FEATURES = """{% for message in messages %}
  {% if loop.index > 2 %}{% break %}{% endif %}
  {% generation %}
    {% set role = message.role %}
    {{- [role, message.content, none, '<&ü'] | tojson }}
    {{- {'b': 1, 'a': 'é'} | tojson(indent=2, sort_keys=true) }}
  {% endgeneration %}
  [{{ role }}] {{ message.extra is defined }}
{% endfor %}
{{ strftime_now('%j') | length }}{{ 'T' if tools is none and documents is none }}{{ pad_token }}"""


def test_what_templates_may_use_is_as_in_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  chat = load("olmoe", tmp_path, FEATURES)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  messages = [SYSTEM, {"role": "assistant", "content": "a", "extra": None}, ASSISTANT]
  assert chat._render(messages, True) == theirs.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )


def test_json_in_prompts_is_not_escaped(tmp_path):
  text = load("chatml", tmp_path).render([USER | {"extra": {"a": "<&'ü"}}])
  assert '{"a": "<&\'ü"}' in text


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
  for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
    with pytest.raises(ValueError, match="refuses messages"):
      load("olmoe", tmp_path, template).render([USER])


def test_templates_without_end_or_of_any_size_get_a_sentence(tmp_path, monkeypatch):
  loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
  double = "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}"
  monkeypatch.setattr(template_process, "SECONDS", 0.3)
  template_process.end()
  for template, sentence in [
    (loops, r"it takes more than 0\.3 seconds"),
    ("{{ lipsum(n=10 ** 9) }}", r"it takes more than 0\.3 seconds"),
    ("{{ 'x' * 10 ** 10 }}", "it needs more than 512 MiB of memory"),
    ("{{ '%10000000000d' % 1 }}", "it needs more than 512 MiB of memory"),
    ("{{ '{:>10000000000}'.format(1) }}", "it needs more than 512 MiB of memory"),
    (double + "{% endfor %}{{ n.s }}", "it (needs more than 512 MiB|takes more than).*"),
    ("{% set n = 2 ** 24 %}{{ 'x' * n }}yz", "its text has more than 16,777,216 characters"),
    ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "maximum recursion depth exceeded.*"),
  ]:
    with pytest.raises(template_process.TemplateError, match=f"^{sentence}$"):
      template_process.render(template, {}, DATE)
  monkeypatch.undo()
  template_process.end()
  with pytest.raises(ValueError, match=rf"{tmp_path} refuses messages .*: it needs more than 512"):
    load("olmoe", tmp_path, "{{ '%10000000000d' % messages|length }}").render([USER])


def test_the_day_is_todays_unless_it_is_set(tmp_path):
  before = datetime.date.today()
  chat = load("harmony", tmp_path)
  day = chat.settings["date"]
  assert before.isoformat() <= day <= datetime.date.today().isoformat()
  assert f"Current date: {day}\n" in chat.render([USER])
  assert load("harmony", tmp_path, date=DATE).settings["date"] == DATE
  for bad in ("31.1.2025", "2025-02-30", ""):
    with pytest.raises(ValueError, match="must be YYYY-MM-DD"):
      load("harmony", tmp_path, date=bad)


def test_settings_hold_what_prompts_depend_on(tmp_path):
  low, high = (
    load("harmony", tmp_path, date=DATE, reasoning_effort=effort).settings
    for effort in ("low", "high")
  )
  assert low == high | {"reasoning_effort": "low"}
  thinking = load("thinking", tmp_path, enable_thinking=False).settings
  assert thinking["enable_thinking"] is False and "date" not in thinking
  changed = load("thinking", tmp_path, chat_formats.THINKING + " ", enable_thinking=False).settings
  assert thinking == changed | {"template": thinking["template"]} != changed


@pytest.mark.parametrize(
  "name, settings, sentence",
  [
    ("olmoe", {"reasoning_effort": "low"}, r"reasoning_effort: leave it out$"),
    ("thinking", {"reasoning_effort": "low"}, r"reasoning_effort: .* \(it uses enable_thinking\)"),
    ("harmony", {"enable_thinking": True}, r"enable_thinking: .* \(it uses reasoning_effort\)"),
    ("mixtral", {"date": DATE}, "does not use the date"),
    ("olmoe", {"bos_token": "x"}, "does not use the setting bos_token"),
  ],
)
def test_a_setting_that_the_template_does_not_use_is_refused(name, settings, sentence, tmp_path):
  with pytest.raises(ValueError, match=sentence):
    load(name, tmp_path, **settings)
  load(name, tmp_path, **dict.fromkeys(settings))  # None is the template's default


@pytest.mark.parametrize(
  "name, template, messages, sentence",
  [
    (
      "mixtral",
      None,
      [SYSTEM, USER],
      "refuses messages with the roles system, user: roles must alternate, beginning with user$",
    ),
    ("mixtral", None, [USER, USER], "roles user, user: roles must alternate"),
    ("olmoe", "{{ messages[0].name + 'x' }}", [USER], "refuses .* has no attribute 'name'"),
    ("olmoe", "{{ 1 + 'x' }}", [USER], "refuses .* unsupported operand"),
    (
      "olmoe",
      "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
      [SYSTEM, USER],
      "leaves out messages of the role 'system'",
    ),
    ("olmoe", "{{ messages[0].content }}", [USER, ASSISTANT], "the assistant's last message"),
  ],
)
def test_messages_that_a_template_cannot_take_get_a_sentence(
  name, template, messages, sentence, tmp_path
):
  with pytest.raises(ValueError, match=sentence) as raised:
    load(name, tmp_path, template).prompt(messages)
  assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
  "messages",
  [
    [],
    "hello",
    None,
    {"role": "user", "content": "x"},
    [3],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
  ],
)
def test_malformed_messages_get_a_sentence(messages):
  with pytest.raises(ValueError, match='"role"'):
    check_messages(messages)
  check_messages([USER])


def test_a_template_is_found_in_the_files_that_may_hold_it(tmp_path):
  chat_formats.write(tmp_path, "olmoe")
  config, file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
  config.write_text(json.dumps({"chat_template": "config"}))
  (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
  file.write_text("ü")
  assert load_template(tmp_path) == "ü"
  file.unlink()
  assert load_template(tmp_path) == "config"
  named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
  config.write_text(json.dumps({"chat_template": named}))
  assert load_template(tmp_path) == "listed"
  config.write_text("{}")
  assert load_template(tmp_path) == "json"
  (tmp_path / "chat_template.json").unlink()
  with pytest.raises(ValueError, match="has no chat template .* give plain prompts"):
    load_template(tmp_path)
  config.write_text(json.dumps({"chat_template": named[:1]}))
  with pytest.raises(ValueError, match="chat templates tool_use and none named default"):
    load_template(tmp_path)
  config.write_text(json.dumps({"chat_template": ["x"]}))
  with pytest.raises(ValueError, match="must be text or a list whose items are JSON objects"):
    load_template(tmp_path)
  file.write_text("{% for %}")
  with pytest.raises(ValueError, match="is not a valid jinja template: line 1"):
    Chat.load(tmp_path, Tokenizer.load(tmp_path))


def marks(tmp_path, chat):
  return [Tokenizer.load(tmp_path).token(i) for i in chat.stop_tokens]


@pytest.mark.parametrize(
  "name, template, eos, expected",
  [
    # Named in no file but the template.
    ("chatml", None, "<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]),
    ("thinking", None, "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    ("thinking", None, "<|im_end|>", ["<|im_end|>"]),
    ("olmoe", None, "<|endoftext|>", ["<|endoftext|>"]),
    ("mixtral", None, "</s>", ["</s>"]),
    ("deepseek", None, "<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),
    ("moonlight", None, "[EOS]", ["[EOS]", "<|im_end|>"]),
    ("r1", None, "<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),
    ("ling", None, "<|endoftext|>", ["<|endoftext|>", "<|role_end|>"]),
    # <|end|> follows an assistant's message, too, but ends only its analysis.
    ("harmony", None, "<|endoftext|>", ["<|return|>", "<|endoftext|>", "<|call|>"]),
    (
      "harmony",
      "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}",
      "<|return|>",
      ["<|return|>", "<|call|>"],
    ),
    # White space before it, other text before it, no end at all, a refusal.
    (
      "chatml",
      "{{ messages[-1].content }} \n<|im_end|>",
      "<|endoftext|>",
      ["<|endoftext|>", "<|im_end|>"],
    ),
    ("chatml", "{{ messages[-1].content }}.<|im_end|>", "<|endoftext|>", ["<|endoftext|>"]),
    ("chatml", "{{ messages[-1].content }}", "<|endoftext|>", ["<|endoftext|>"]),
    ("chatml", "{{ raise_exception('no') }}", "<|endoftext|>", ["<|endoftext|>"]),
  ],
)
def test_answers_end_with_the_turn(name, template, eos, expected, tmp_path):
  eos_id = chat_formats.tokenizer(name).token_to_id(eos)
  chat = load(name, tmp_path, template, {"generation_config": {"eos_token_id": eos_id}})
  assert marks(tmp_path, chat) == expected


def test_prompts_have_the_tokenizers_end_of_text_and_stop_at_the_models_too(tmp_path):
  transformers = pytest.importorskip("transformers")
  chat = load(
    "olmoe",
    tmp_path,
    files={
      "tokenizer_config": {"bos_token": "<|padding|>", "eos_token": "<|new|>"},
      "added_tokens": {"<|new|>": 258},
      "config": {"eos_token_id": 256},
    },
  )
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  messages = [USER, ASSISTANT, AGAIN]
  assert chat.prompt(messages).tokens == theirs.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=False
  )
  assert chat.stop_tokens == (theirs.eos_token_id, 256) == (258, 256)


def test_what_users_write_opens_no_thoughts(tmp_path):
  chat = load("thinking", tmp_path)
  prompt = chat.prompt([{"role": "user", "content": "What is <think>?"}])
  completion = Completion(Tokenizer.load(tmp_path).encode("A mark."), [], [], "length")
  assert chat.answer(prompt, completion).final == "A mark."


@pytest.mark.parametrize(
  "name, messages, settings, opening",
  [
    ("olmoe", "three", {}, "<|assistant|>\n"),
    ("mixtral", "three", {}, ""),
    ("harmony", "one", {}, "<|start|>assistant"),
    ("harmony", "prefilled", {}, "<|start|>assistant<|channel|>final<|message|>It is\n"),
    (
      "thinking",
      "one",
      {"enable_thinking": False},
      "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    ("thinking", "prefilled", {}, "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is\n"),
    ("deepseek", "three", {}, "Assistant:"),
    ("r1", "three", {}, "<｜Assistant｜><think>\n"),
    ("ling", "one", {}, "<role>ASSISTANT</role>"),
  ],
)
def test_a_prompt_knows_what_it_holds_of_the_answers_turn(
  name, messages, settings, opening, tmp_path
):
  prompt = load(name, tmp_path, **settings).prompt(CHATS[messages])
  tokenizer = Tokenizer.load(tmp_path)
  assert tokenizer.decode(prompt.opening, skip_special_tokens=False) == opening
  assert prompt.tokens[len(prompt.tokens) - len(prompt.opening) :] == prompt.opening


def test_an_answer_without_a_question_may_be_continued(tmp_path):
  # This template looks at the first message, so that none cannot be rendered.
  chat = load("olmoe", tmp_path, "{{ messages[0].role + ':' + messages[0].content }}")
  assert chat.render([ASSISTANT]) == "assistant:It is 2."
  assert chat.prompt([ASSISTANT]).opening == chat.prompt([ASSISTANT]).tokens
