"""The model: configuration, vision tower, rotary positions, attention, decoder, generation."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from phi3v.data.processor import Phi3VProcessor
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.phi3v import Phi3VForCausalLM, Phi3VModel

AutoConfig.register("phi3_v", Phi3VConfig)
AutoModel.register(Phi3VConfig, Phi3VModel)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor)

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VModel"]
