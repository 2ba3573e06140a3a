"""Text to token ids and back: encoding, chat templates, incremental detokenisation, stop strings. Free of torch."""

from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.detokenizer import IncrementalDetokenizer
from engine.tokenizer.stop_strings import StopStringMatcher
from engine.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopStringMatcher", "Tokenizer"]
