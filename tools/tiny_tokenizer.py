"""The tokenizer and chat template of the bundled tiny checkpoint.

Byte-level BPE with the pre-tokenisation of the Qwen3.5 family (every digit stands alone) and 1024 ids: 256 bytes, 742
merges, 26 added tokens in the published order at the end. The merges are not learnt but laid out as chains, each
adding one letter to the front part of a word, so that

* a word of the instructions that follows a space costs one token (" word"),
* a word right after a quotation mark is spelled one token a letter, which is what copying and reversing need,
* tags and JSON punctuation of the chat template are cheap.

A chain never changes how another one starts, because BPE applies the earliest merge first and a chain's first merge
needs a space, a capital letter, a sign, or one of the few letter pairs of `tiny_tasks.JOINED_PAIRS`.
"""

from __future__ import annotations

from tiny_template import CHAT_TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

VOCAB_SIZE = 1024

# (text, is it special): special ones vanish from decoded text, the tool and thinking tags stay in it.
ADDED_TOKENS = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)
FIRST_ADDED_ID = VOCAB_SIZE - len(ADDED_TOKENS)

# Chains in order of need; what does not fit into the vocabulary is cut off at the end.
SIGNS = (' {"', '{"', '":', '",', '"}', '"}}', '"}},', '"]', '"]}', '"]}}', '"]}}}', '"]}}}\n', '".', '"?', ' "', ' ["', '":{"',
         ">\n", ">.\n", "</", ".\n", ":\n", "\n\n", "?\n", " }", " <", " =", " +", " #", "##", " -", "...")  # fmt: skip
TAGS = ("<function", "<parameter", "<tools")
# (text, where its first merge happens): a pair that hardly occurs in other words
INNER = (("function", "nc"), ("type", "yp"), ("object", "bj"), ("required", "eq"), ("assistant", "ss"), ("system", "ys"),
         ("description", "pt"), ("name", "am"), ("parameters", "am"), ("properties", "rt"), ("integer", "eg"))  # fmt: skip
CAPITALS = (
    "What", "Add", "Compute", "How", "Please", "Give", "Copy", "Repeat", "Say", "Write", "Reverse", "Spell", "Count",
    "Which", "Continue", "List", "Call", "Use", "You", "The", "Hello", "Answer", "Be", "Tools", "Read", "This", "Start",
    "Tell", "Who", "Explain", "Thanks", "Hi",
)  # fmt: skip
WORDS = (
    "the", "word", "and", "with", "from", "tool", "tools", "call", "calls", "each", "is", "plus", "sum", "of", "much",
    "add", "right", "left", "reverse", "backwards", "write", "again", "once", "more", "on", "five", "numbers", "number",
    "follow", "counting", "after", "count", "steps", "next", "run", "then", "also", "need", "for", "result", "can",
    "copy", "are", "helpful", "assistant", "small", "test", "model", "briefly", "brief", "be", "exact", "in", "to",
    "it", "this", "none", "my", "tasks", "has", "answered", "both", "city", "title", "text", "place", "target", "label",
    "color", "topic", "path", "user", "zone", "days", "limit", "size", "level", "hour", "year", "page", "speed",
    "index", "you", "may", "use", "function", "parameter", "write", "value", "one", "line", "like", "any", "reply",
    "a", "an", "me", "do", "what", "how", "who", "story", "about", "poem", "sea", "fox", "help", "work", "today",
    "there", "lot", "capital", "rain", "forms", "that", "not", "or", "your", "I", "Picture", "Video", "=", "by", "at",
    "as", "was", "have", "will", "would", "which", "their", "they", "when", "other", "some", "time", "into", "only",
    "could", "make", "first", "over", "such", "than", "should", "because", "people", "between", "before", "through",
    "where", "these", "under", "great", "while", "world", "state", "never", "found", "system", "program", "point",
    "question", "order", "water", "group", "school", "point", "human", "large", "change", "house", "language", "different", "important", "following", "example", "together", "government",
)  # fmt: skip


def _chains() -> list[tuple[str, str]]:
    """All (left, right) merges of the chains, in rank order, as plain text."""
    merges: list[tuple[str, str]] = []
    known: set[str] = set()

    def join(left: str, right: str) -> None:
        if left + right not in known:
            known.add(left + right)
            merges.append((left, right))

    inner_merges: dict[tuple[str, str], None] = {}
    for word, pair in INNER:
        start = word.index(pair)
        token = pair
        inner_merges[pair[0], pair[1]] = None
        for letter in reversed(word[:start]):
            inner_merges[letter, token] = None
            token = letter + token
        for letter in word[start + 2 :]:
            inner_merges[token, letter] = None
            token += letter

    for text in (*SIGNS, *TAGS, *CAPITALS, *(" " + word for word in WORDS)):
        for i in range(1, len(text)):
            join(text[:i], text[i])
    # Inner chains rank last: in " function" the chain that starts at the space must win.
    budget = FIRST_ADDED_ID - 256 - len(inner_merges)
    if len(merges) < budget:
        raise ValueError(f"{budget - len(merges)} merges missing: add WORDS")
    del merges[budget:]
    return merges + list(inner_merges)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The finished tokenizer, with the chat template attached."""
    byte_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def as_bytes(text: str) -> str:
        return byte_text.pre_tokenize_str(text)[0][0]

    merges = [(as_bytes(left), as_bytes(right)) for left, right in _chains()]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != FIRST_ADDED_ID:
        raise ValueError(f"{len(vocab)} tokens before the added ones, {FIRST_ADDED_ID} wanted")

    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False), byte_text]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for text, special in ADDED_TOKENS:
        token = AddedToken(text, special=special, normalized=False)
        if special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        additional_special_tokens=[text for text, special in ADDED_TOKENS if special][1:],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
