"""Small chat templates in the formats of known models, and a tokenizer for each."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers


def _one_line(template):
  return "".join(line.strip() for line in template.splitlines())


OLMOE = _one_line("""{{ bos_token }}{% for message in messages %}
{% if message['role'] in ['system', 'user'] %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{% else %}
{{ '<|assistant|>\\n' + message['content'] + eos_token + ('' if loop.last else '\\n') }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{% endif %}
{% endfor %}""")

# A system message breaks its rule.
MIXTRAL = _one_line("""{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate,\\nbeginning with user') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{ ' [INST] ' + message['content'] + ' [/INST]' }}
  {% else %}
    {%- generation %}
{{ ' ' + message['content'] | trim + eos_token }}
    {%- endgeneration %}
  {% endif %}
{% endfor %}""")

HARMONY = """{%- macro preamble() -%}
  {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
  {%- if reasoning_effort is not defined %}
    {%- set reasoning_effort = "medium" %}
  {%- endif %}
  {{- "Reasoning: " + reasoning_effort + "\\n\\n# Valid channels: analysis, commentary, final." }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + preamble() + "<|end|>" }}
{%- set rest = messages %}
{%- if messages[0].role in ["system", "developer"] %}
  {{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "<|end|>" }}
  {%- set rest = messages[1:] %}
{%- endif %}
{%- for message in rest %}
  {%- if message.role == "user" %}
    {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
  {%- else %}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
    {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""

CHATML = _one_line("""{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% if message.extra %}
{{ message.extra | tojson }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}""")

THINKING = """{%- for message in messages %}
  {%- set content = message.content %}
  {%- if message.role == "assistant" %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- if loop.last %}
      {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
    {%- endif %}
  {%- endif %}
  {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}"""

# DeepSeek-V2-Lite's, whose turns begin with words and not with tokens, and Moonlight's.
DEEPSEEK = _one_line("""{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ 'User: ' + message['content'] + '\\n\\n' }}
{% elif message['role'] == 'assistant' %}
{{ 'Assistant: ' + message['content'] + eos_token }}
{% else %}
{{ message['content'] + '\\n\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:' }}
{% endif %}""")

MOONLIGHT = _one_line("""{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' }}
{% endif %}
{{ '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' }}
{{ message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_assistant|>assistant<|im_middle|>' }}
{% endif %}""")

# DeepSeek-R1's: thoughts are opened in the prompt, and left out of earlier turns.
R1 = """{{- bos_token }}
{%- for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' %}
    {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<｜Assistant｜><think>\\n' }}
{%- endif %}"""

# Ling-mini-2.0's, whose system message is always there.
LING = """{%- set option = 'on' if enable_thinking is defined and enable_thinking else 'off' %}
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
{{- 'detailed thinking ' + option + '<|role_end|>' }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
  {%- elif message.role == 'assistant' %}
    {{- '<role>ASSISTANT</role>' + message.content + '<|role_end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{%- endif %}"""

TEMPLATES = {
  "olmoe": OLMOE,
  "mixtral": MIXTRAL,
  "harmony": HARMONY,
  "chatml": CHATML,
  "thinking": THINKING,
  "deepseek": DEEPSEEK,
  "moonlight": MOONLIGHT,
  "r1": R1,
  "ling": LING,
}
SPECIAL = {
  "olmoe": ["<|endoftext|>", "<|padding|>"],
  "mixtral": ["<unk>", "<s>", "</s>"],
  "harmony": [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
  ],
  "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
  "thinking": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
  "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
  "moonlight": [
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
  ],
  "r1": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
  "ling": ["<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"],
}
_DEEPSEEK_NAMED = {
  "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
  "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
}
NAMED = {
  "olmoe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
  "mixtral": {
    "bos_token": {"__type": "AddedToken", "content": "<s>"},
    "eos_token": "</s>",
    "unk_token": "<unk>",
  },
  "harmony": {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
  "chatml": {"eos_token": "<|endoftext|>"},
  "thinking": {"eos_token": "<|im_end|>"},
  "deepseek": _DEEPSEEK_NAMED,
  "moonlight": {"bos_token": "[BOS]", "eos_token": "[EOS]"},
  "r1": _DEEPSEEK_NAMED,
  "ling": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"},
}


def tokenizer(name):
  """One token for each byte, and the format's special ones behind them."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(SPECIAL[name])
  if name in ("thinking", "r1"):  # tokens of their own, but not special: so it is in Qwen3
    made.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
  return made


def write(folder, name, template=None, **files):
  """A folder with the tokenizer and the template of a format, and more JSON files."""
  folder.mkdir(exist_ok=True)
  tokenizer(name).save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(NAMED[name]))
  (folder / "chat_template.jinja").write_text(template or TEMPLATES[name])
  for file, values in files.items():
    (folder / f"{file}.json").write_text(json.dumps(values))
  return folder
