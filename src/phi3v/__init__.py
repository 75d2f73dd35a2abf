"""phi3v: fine-tune Phi-3.5-vision natively, exactly and resumably.

Importing it registers the architecture, so that `AutoConfig`, `AutoProcessor`, `AutoModelForCausalLM` and
`AutoModelForImageTextToText` load published checkpoints without remote code.
"""

from transformers import AutoProcessor

from phi3v.data.processor import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model import Phi3VConfig, Phi3VForCausalLM, Phi3VModel

AutoProcessor.register(Phi3VConfig, Phi3VProcessor)

__version__ = "0.1.0"
__all__ = ["InputError", "Phi3VConfig", "Phi3VForCausalLM", "Phi3VModel", "Phi3VProcessor"]
