"""The tokenizer and chat template of the embedded model.

Byte-level, so that any text can be written; merges are learned from lower-case question wording only, so questions
are short while digits, capitals and punctuation of answers stay one token a character, which is what reading from a
picture wants. The chat template gives the same turns as Qwen3-VL's, without a default system turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qzoom.data.synthetic.texts import COLOURS, FIELD_WORDINGS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORD_SPLIT = r" ?\p{Ll}+|.|\s"

_EXTRA_SENTENCES = (
    "what is the name of the item in the first row second third last bottom top of the page yes no left right middle",
    "receipt invoice form table order member account bill document reference number amount quantity address city phone",
    "grand rounding cash change paid payment due service charge discount balance price unit cost item code description",
    "where is it who when which how many much does do are was were has have printed shown given written on in at for",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def vocabulary_sentences() -> list[str]:
    """The lower-case sentences from which tokenizer merges are learned; always the same list in the same order."""
    blank = dict.fromkeys(("n", "name", "column", "code", "colour", "shape", "colour2", "shape2"), "")
    sentences = [wording.format(**blank).lower() for wordings in FIELD_WORDINGS.values() for wording in wordings]
    words = " ".join((*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)))
    return [*sentences, words, *_EXTRA_SENTENCES]


def build_tokenizer(sentences: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with at most `vocabulary_size` entries whose merges come from `sentences`.

    The 256 bytes and the eight special tokens are always there. Words are runs of lower-case letters with an optional
    space before them; every other character stands alone, so no merge can ever join digits or capitals.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_lower_words(sentence) for sentence in sentences for _ in range(2)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "im_start_token": "<|im_start|>",
        },
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _lower_words(sentence: str) -> str:
    """The sentence's lower-case words alone, so that nothing else can be merged."""
    return " " + " ".join(re.findall(r"[a-z]+", sentence.lower()))
