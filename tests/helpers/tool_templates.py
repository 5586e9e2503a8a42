"""Chat templates that show tools, calls and reasoning, and templates that mark the targets themselves."""

from tests.helpers.tokenizers import (
    PHI_4_MINI,
)

# As Qwen's and Hermes': tools and calls as JSON in tags, results in a user's turn, reasoning in front.
TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>' }}
    {%- if style %}
        {{- '\nStyle: ' + style }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- GENERATION %}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if not loop.first or message.content %}
                {{- '\n' }}
            {%- endif %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
        {%- ENDGENERATION %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
MARKED_TOOLS = TOOLS.replace("ENDGENERATION", "endgeneration").replace("GENERATION", "generation")
UNMARKED_TOOLS = TOOLS.replace("{%- ENDGENERATION %}", "").replace("{%- GENERATION %}", "")
# Arguments through `tojson`, whatever they are.
ENCODING_TOOLS = UNMARKED_TOOLS.replace("tool_call.arguments is string", "false")

_ANSWER = "message['content'] + '<|end|>\\n'"
_TURNS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant'LAST %}"
    f"{{% generation %}}{{{{ {_ANSWER} }}}}{{% endgeneration %}}{{% else %}}{{{{ {_ANSWER} }}}}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# In Phi-3's layout, every answer or the last alone.
MARKED = _TURNS.replace("LAST", "")
MARKED_LAST = _TURNS.replace("LAST", " and loop.last")
# Reasoning in Phi-4-mini's layout, where `<think>` is no token.
THINKING = PHI_4_MINI.replace(
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content']",
    "{% else %}{{ '<|' + message['role'] + '|>' + ('<think>' + message['reasoning_content'] + '</think>' "
    "if 'reasoning_content' in message else '') + message['content']",
)
