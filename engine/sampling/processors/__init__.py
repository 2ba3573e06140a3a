"""One file per logits processor. They run in ascending ``order``, which is that of Hugging Face transformers:

10 logit_bias, 20 min_tokens, 30 penalties           change which token is the likeliest
40 temperature, 50 top_k, 60 top_p, 70 min_p         do not; greedy rows pass them by
"""
