"""Chat template of the tiny checkpoint: the behaviour of the Qwen3.5 family's, with shorter instructions."""

CHAT_TEMPLATE = r"""
{%- set seen = namespace(images=0, videos=0) -%}

{%- macro show(content, in_system=false, counted=true) -%}
    {%- if content is none or content is not defined -%}
    {%- elif content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- if in_system -%}
                    {{- raise_exception('A system message may hold text only, found an image.') -}}
                {%- endif -%}
                {%- if counted -%}
                    {%- set seen.images = seen.images + 1 -%}
                {%- endif -%}
                {%- if add_vision_id -%}
                    {{- 'Picture ' ~ seen.images ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part or 'video_url' in part -%}
                {%- if in_system -%}
                    {{- raise_exception('A system message may hold text only, found a video.') -}}
                {%- endif -%}
                {%- if counted -%}
                    {%- set seen.videos = seen.videos + 1 -%}
                {%- endif -%}
                {%- if add_vision_id -%}
                    {{- 'Video ' ~ seen.videos ~ ': ' -}}
                {%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('A content part must be text, an image or a video.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- raise_exception('Message content must be a string or a list of parts.') -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro show_call(call) -%}
    {%- set inner = call.function if call.function is defined else call -%}
    {{- '<tool_call>\n<function=' ~ inner.name ~ '>\n' -}}
    {%- if inner.arguments is defined and inner.arguments is not none -%}
        {%- if inner.arguments is not mapping -%}
            {{- raise_exception('Tool call arguments must be a mapping.') -}}
        {%- endif -%}
        {%- for key, value in inner.arguments.items() -%}
            {{- '<parameter=' ~ key ~ '>\n' -}}
            {%- if value is mapping or (value is iterable and value is not string) -%}
                {{- value | tojson -}}
            {%- else -%}
                {{- value | string -}}
            {%- endif -%}
            {{- '\n</parameter>\n' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '</function>\n</tool_call>' -}}
{%- endmacro -%}

{%- if not messages -%}
    {{- raise_exception('There are no messages.') -}}
{%- endif -%}

{#- The last message that a person wrote: a user turn that only carries tool responses does not count. -#}
{%- set query = namespace(index=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set text = show(message.content, counted=false) | trim -%}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) -%}
            {%- set query.index = loop.index0 -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if query.index < 0 -%}
    {{- raise_exception('There is no user message to answer.') -}}
{%- endif -%}

{%- if tools and tools is iterable and tools is not mapping -%}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' -}}
    {%- for tool in tools -%}
        {{- '\n' -}}{{- tool | tojson -}}
    {%- endfor -%}
    {{- '\n</tools>\n\nWrite each call like this:\n<tool_call>\n<function=a>\n<parameter=b>\nvalue\n</parameter>\n</function>\n</tool_call>' -}}
    {%- if messages[0].role == 'system' -%}
        {%- set text = show(messages[0].content, in_system=true) | trim -%}
        {%- if text -%}
            {{- '\n\n' ~ text -}}
        {%- endif -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\n' ~ (show(messages[0].content, in_system=true) | trim) ~ '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('Only the first message may be a system message.') -}}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ (show(message.content) | trim) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set text = show(message.content) | trim -%}
        {%- set reasoning = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif '</think>' in text -%}
            {%- set reasoning = text.split('</think>')[0].split('<think>')[-1] -%}
            {%- set text = text.split('</think>')[-1] | trim -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if preserve_thinking or loop.index0 > query.index -%}
            {{- '<think>\n' ~ (reasoning | trim) ~ '\n</think>\n\n' -}}
        {%- endif -%}
        {{- text -}}
        {%- if message.tool_calls is iterable and message.tool_calls is not string and message.tool_calls is not mapping -%}
            {%- for call in message.tool_calls -%}
                {%- if not loop.first -%}
                    {{- '\n' -}}
                {%- elif text -%}
                    {{- '\n\n' -}}
                {%- endif -%}
                {{- show_call(call) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\n<tool_response>\n' ~ (show(message.content) | trim) ~ '\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Unknown message role: ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()
