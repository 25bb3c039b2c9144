"""Chat templates of the kinds that checkpoints bring, in short forms of our own, for tests."""

# Qwen2.5's kind: tools in a system turn, calls behind the text, results in a user's turn.
TOOLS = """{%- if tools %}{{- '<|im_start|>system\\nYou may call:' }}{%- for tool in tools %}
{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role }}{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Qwen3's kind: reasoning of its own field or cut out of the content, shown for the last turn alone,
# an empty block where there is none; `enable_thinking` false puts that block into the generation
# prompt.
REASONING = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- set content = m.content or '' %}{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

# DeepSeek-R1's kind: the generation prompt opens the reasoning, earlier turns lose theirs.
OPENED = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{- m.content.split('</think>')[-1] }}{%- else %}{{- m.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# Llama's kind: contents are trimmed.
TRIMMED = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"""

# Gemma's kind: the system prompt is a part of the first question.
FOLDED = """{%- set lead = '' %}{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content + '\\n\\n' %}{%- endif %}
{%- for m in messages %}{%- if m.role != 'system' %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (lead if loop.index0 == 1 else '') + m.content | trim + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>model\\n' }}{%- endif %}"""

# One that knows two roles and passes over the others.
TWO_ROLES = """{%- for m in messages %}{%- if m.role in ('user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

ALL = {
    "tools": TOOLS,
    "reasoning": REASONING,
    "opened": OPENED,
    "trimmed": TRIMMED,
    "folded": FOLDED,
    "two_roles": TWO_ROLES,
}
