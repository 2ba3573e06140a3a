"""Text to token ids and back: encoding, chat templates, incremental detokenisation, stop strings. Free of torch.

Chat templates (engine.tokenizer.chat_template) need Jinja, which is imported when the first is compiled.
"""

from engine.tokenizer.detokenizer import IncrementalDetokenizer
from engine.tokenizer.stop_strings import StopStringMatcher
from engine.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStringMatcher", "Tokenizer"]
